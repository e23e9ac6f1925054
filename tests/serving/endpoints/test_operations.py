"""`/health`, `/ready`, `/metrics`, and the documentation of it all."""

from __future__ import annotations

import re
from pathlib import Path

from serving.inference import PATHS, TOKEN_PATHS

API = Path(__file__).parents[3] / "docs" / "api.md"


async def test_health_answers_before_anything_is_ready(serve):
    async with serve(wait=False) as world:
        assert (await world.http.get("/health")).json() == {"status": "ok"}
        response = await world.http.get("/ready")
        assert response.status_code == 503
        assert response.headers["retry-after"]
        assert "starting" in response.json()["reason"]


async def test_ready_waits_for_the_experts_of_the_manifest(serve, until):
    async with serve(wait=False) as world:
        import asyncio

        registered = asyncio.Event()
        world.service.start(registered.wait, world.fatal.append)
        await until(lambda: world.service.failure is None)
        response = await world.http.get("/ready")
        assert response.status_code == 503
        assert "registered" in response.json()["reason"]
        registered.set()
        await until(lambda: world.service.preparing is None)
        response = await world.http.get("/ready")
        assert (response.status_code, response.json()["experts"]) == (200, 3)


def value(text, line):
    """The value of one metric with its labels; 0 when it is not there yet."""
    found = re.search(rf"^{re.escape(line)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


async def metrics(world):
    return (await world.http.get("/metrics")).text


async def test_metrics_count_what_happened(world):
    before = await metrics(world)
    await world.ask("auto", "spell cherry backwards")
    await world.ask("auto", "spell cherry backwards")
    await world.ask("unheard-of", "x")
    world.engine.refuses.add("shout")
    await world.ask("auto", "write cherry loudly")
    after = await metrics(world)
    for line, more in (
        ('moerge_requests_total{kind="select",policy="fusion",status="200"}', 2),
        ('moerge_requests_total{kind="base",policy="fusion",status="200"}', 1),
        ('moerge_requests_total{kind="none",policy="none",status="404"}', 1),
        ('moerge_expert_requests_total{expert="reverse"}', 2),
        ('moerge_fallbacks_total{expert="shout"}', 1),
        ('moerge_route_seconds_count{method="fusion"}', 3),
    ):
        assert value(after, line) - value(before, line) == more, line
    assert value(after, "moerge_experts") == 3
    assert value(after, "moerge_registry_generation") == world.service.generation
    assert value(after, "moerge_ready") == 1


async def test_registrations_are_counted_by_outcome(world, adapters):
    before = await metrics(world)
    samples = ["say banana in french"]
    body = {"name": "translate", "source": {"folder": str(adapters[3])}, "samples": samples}
    await world.http.post("/v1/experts", json=body)
    await world.http.post("/v1/experts", json=body)
    after = await metrics(world)
    for outcome in ("active", "refused"):
        line = f'moerge_registrations_total{{outcome="{outcome}"}}'
        assert value(after, line) - value(before, line) == 1


async def test_every_endpoint_is_documented_and_no_other(world):
    schema = (await world.http.get("/openapi.json")).json()
    served = {(method.upper(), path) for path, methods in schema["paths"].items() for method in methods}
    served |= {("POST", path) for path in (*PATHS, *TOKEN_PATHS)}
    documented = set(re.findall(r"^### `([A-Z]+) (\S+)`$", API.read_text(), re.MULTILINE))
    assert documented == served


async def test_every_field_of_a_registration_is_documented(world):
    schema = (await world.http.get("/openapi.json")).json()
    new = schema["paths"]["/v1/experts"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    table = API.read_text().partition("| Field | |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(new["properties"])


async def test_the_interactive_documentation_is_there(world):
    assert (await world.http.get("/docs")).status_code == 200
