"""The measurements behind `moerge bench serve`: a real server in a process of its own, real HTTP."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from adapters_registry.lora import CONFIG, WEIGHTS
from adapters_registry.manifest import read_manifest
from adapters_registry.proposal import FolderSource

#: Longest wait for a server to be ready (seconds), and rounds in which the two kinds take turns.
STARTUP_LIMIT, ROUNDS = 600, 4
#: Blends that are built and loaded.
BLENDS = 20

Tell = Callable[[str], None]


class BenchFailed(Exception):
    """The server did not do what was to be measured."""


@contextmanager
def served(manifest: Path, folder: Path, *options: str) -> Iterator[tuple[str, float]]:
    """A `moerge serve` of a manifest, on a free port: its URL, and the seconds until it was ready.

    Registry and log are in `folder`; `options` are further options of the command.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "serving.cli", "serve", "--manifest", str(manifest), "--port", str(port)]
    log = folder / "server.log"
    with log.open("wb") as stream:
        started = time.monotonic()
        server = subprocess.Popen(  # noqa: S603
            [*command, "--data-dir", str(folder / "data"), *options],
            stdout=stream,
            stderr=stream,
            env={**os.environ, "MOERGE_LOG_LEVEL": "warning"},
        )
        try:
            url = f"http://127.0.0.1:{port}"
            while not is_ready(url):
                if server.poll() is not None or time.monotonic() - started > STARTUP_LIMIT:
                    raise BenchFailed(f"The server did not become ready:\n{log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.2)
            yield url, time.monotonic() - started
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                server.kill()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def bench_served(
    manifest: Path | None, requests: int, tokens: int, concurrency: list[int], tell: Tell
) -> dict[str, Any]:
    """All the figures of `moerge bench serve`; without a manifest, of a synthetic model. Raises BenchFailed."""
    with tempfile.TemporaryDirectory(prefix="moerge-bench-") as name:
        folder = Path(name)
        if manifest is None:
            from serving.synthetic import write_synthetic  # transformers takes seconds to import

            tell("Making a random model ...")
            (folder / "synthetic").mkdir()
            manifest = write_synthetic(folder / "synthetic")
        prompts = fresh_prompts(manifest)
        tell("Starting the server ...")
        with served(manifest, folder) as (url, startup):
            return asyncio.run(measure(url, startup, manifest, folder, prompts, requests, tokens, concurrency, tell))


def fresh_prompts(manifest: Path) -> Iterator[str]:
    """Endless prompts that no cache has seen: the experts' samples, each with another number behind it."""
    samples = [sample.prompt for proposal in read_manifest(manifest).proposals for sample in proposal.samples]
    if not samples:
        raise BenchFailed(f"{manifest} has no samples to make prompts of.")
    order = random.Random(0)
    for number in itertools.count():
        yield f"{order.choice(samples)} {number}"


async def measure(
    url: str,
    startup: float,
    manifest: Path,
    folder: Path,
    prompts: Iterator[str],
    requests: int,
    tokens: int,
    concurrency: list[int],
    tell: Tell,
) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=max(concurrency) + 8)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:

        async def ask(prompt: str, model: str, **changes: Any) -> httpx.Response:
            body = {
                "model": model,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                **changes,
            }
            response = await http.post("/v1/chat/completions", json=body)
            if not response.is_success:
                raise BenchFailed(f"{model}: {response.text:.300}")
            return response

        async def route(prompt: str) -> dict[str, Any]:
            body = {"messages": [{"role": "user", "content": prompt}]}
            decision: dict[str, Any] = (await http.post("/v1/route", json=body)).json()["decision"]
            return decision

        async def batch(pairs: list[tuple[str, str]], width: int) -> tuple[float, list[float]]:
            """Seconds for all, and each one's latency (ms), with `width` in flight."""
            queue = iter(pairs)
            latencies: list[float] = []

            async def work() -> None:
                for prompt, model in queue:
                    began = time.perf_counter()
                    await ask(prompt, model)
                    latencies.append((time.perf_counter() - began) * 1e3)

            began = time.perf_counter()
            await asyncio.gather(*(work() for _ in range(width)))
            return time.perf_counter() - began, latencies

        cards = (await http.get("/v1/models")).json()["data"]
        names = [proposal.name for proposal in read_manifest(manifest).proposals]
        base = next(card["id"] for card in cards if not card["parent"])
        for name in names:  # every adapter has been loaded once, every code path has been run
            await ask(next(prompts), name)

        rows = []
        for width in concurrency:
            tell(f"{width} concurrent ...")
            seconds: dict[str, list[float]] = {"named": [], "auto": []}
            latencies: dict[str, list[float]] = {"named": [], "auto": []}
            each = max(width, requests // ROUNDS)
            for turn in range(ROUNDS):
                # The client that names the expert asks for the one that `auto` would take: equal work.
                asked = [next(prompts) for _ in range(each)]
                decisions = await asyncio.gather(*map(route, asked))
                chosen = [d["experts"][0]["expert"] if d["experts"] else base for d in decisions]
                named = [(f"{prompt} ", model) for prompt, model in zip(asked, chosen, strict=True)]
                auto = [(f"{prompt}.", "auto") for prompt in asked]
                kinds = [("named", named), ("auto", auto)]
                for kind, pairs in kinds if turn % 2 == 0 else reversed(kinds):
                    took, all_latencies = await batch(pairs, width)
                    seconds[kind].append(took)
                    latencies[kind] += all_latencies
            ratios = [n / a for n, a in zip(seconds["named"], seconds["auto"], strict=True)]
            rows.append(
                {
                    "concurrency": width,
                    "requests": each * ROUNDS,
                    **{kind: figures(seconds[kind], latencies[kind], each * tokens) for kind in ("named", "auto")},
                    "ratio": statistics.median(ratios),
                    "ratios": ratios,
                }
            )
        totals = [(await route(next(prompts)))["timings"]["total"] for _ in range(100)]
        blend = await blend_times(ask, names, prompts, tell)
        tell("Registering an expert ...")
        register = await register_to_answer(http, ask, manifest, folder)
    return {
        "base_model": base,
        "tokens": tokens,
        "cores": os.cpu_count(),
        "throughput": rows,
        "route_ms": spread(totals),
        "blend": blend,
        "register_to_answer_s": register,
        "startup_s": startup,
    }


async def blend_times(ask: Any, names: list[str], prompts: Iterator[str], tell: Tell) -> dict[str, Any]:
    """Latencies (ms) of answers of one token, one at a time, in turns; `added_ms`: over `single_ms`, of each median.

    single     one expert, loaded
    cold       two experts merged by `cat`, for the first time: built and loaded
    warm       the same blend again
    composite  the two experts in a composite that stays loaded, with weights that the request brings along
    """
    if len(names) < 2:
        return {}
    tell("Blending two experts ...")
    first, second = names[:2]
    latencies: dict[str, list[float]] = {"single": [], "cold": [], "warm": [], "composite": []}

    async def timed(kind: str | None, model: str, **extension: Any) -> None:
        began = time.perf_counter()
        await ask(next(prompts), model, max_tokens=1, **({"moerge": extension} if extension else {}))
        if kind:
            latencies[kind].append((time.perf_counter() - began) * 1e3)

    for turn in range(BLENDS + 1):  # the first of each is not counted: the composite is built then
        weights = {first: 0.5 + turn / 100, second: 0.5 - turn / 100}  # never seen before
        await timed("single" if turn else None, first)
        await timed("cold" if turn else None, "auto", experts=weights, operator="cat")
        await timed("warm" if turn else None, "auto", experts=weights, operator="cat")
        await timed("composite" if turn else None, "auto", experts=weights)
    single = percentile(latencies["single"], 50)
    return {
        "operator": "cat",
        "members": 2,
        **{f"{kind}_ms": spread(each) for kind, each in latencies.items()},
        "added_ms": {kind: percentile(each, 50) - single for kind, each in latencies.items() if kind != "single"},
    }


async def register_to_answer(http: httpx.AsyncClient, ask: Any, manifest: Path, folder: Path) -> float:
    """Seconds from `POST /v1/experts` until `auto` has answered through the new expert."""
    from safetensors.torch import load_file, save_file  # torch takes seconds to import

    local = [p.source.path for p in read_manifest(manifest).proposals if isinstance(p.source, FolderSource)]
    if not local:
        raise BenchFailed(f"{manifest} has no local adapter to register a copy of.")
    adapter = folder / "adapter"
    adapter.mkdir()
    shutil.copy(local[0] / CONFIG, adapter)
    weights = load_file(local[0] / WEIGHTS)
    save_file({key: value * 1.001 for key, value in weights.items()}, adapter / WEIGHTS)  # new content
    samples = [f"Tell me how zebra number {i} crossed the violet glacier" for i in range(10)]
    files = [("files", (each, (adapter / each).read_bytes())) for each in (CONFIG, WEIGHTS)]
    began = time.perf_counter()
    about = json.dumps({"name": "bench-newcomer", "samples": samples})
    response = await http.post("/v1/experts", data={"expert": about}, files=files)
    if response.status_code != 201:
        raise BenchFailed(f"Registering failed: {response.text:.500}")
    answered = await ask("How did zebra number 77 cross the violet glacier?", "auto")
    took = time.perf_counter() - began
    if answered.json()["model"] != "bench-newcomer":
        raise BenchFailed(f"The new expert was not chosen; {answered.json()['model']} answered.")
    return took


def figures(seconds: list[float], latencies: list[float], tokens: int) -> dict[str, float]:
    return {
        "tokens_per_s": statistics.median(tokens / each for each in seconds),
        "p50_ms": percentile(latencies, 50),
        "p95_ms": percentile(latencies, 95),
    }


def spread(values: list[float]) -> dict[str, float]:
    return {"p50": percentile(values, 50), "p95": percentile(values, 95)}


def percentile(values: list[float], q: float) -> float:
    return float(np.percentile(values, q))
