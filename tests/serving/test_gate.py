"""Hosts and sizes, before anything else happens."""

from __future__ import annotations

import pytest

from serving.config import ServerSettings
from serving.gate import allowed, known_hosts


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST", "[::1]"])
async def test_loopback_names_pass(world, host):
    assert (await world.http.get("/health", headers={"host": host})).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8000", "localhost.evil.example", "", "127.0.0.1.evil"])
async def test_a_page_that_points_its_own_name_at_loopback_is_refused(world, host):
    """DNS rebinding: the browser sends the page's name, wherever it resolves to."""
    for path in ("/health", "/v1/models", "/v1/chat/completions"):
        response = await world.http.get(path, headers={"host": host})
        assert response.status_code == 400
        assert "server.allowed_hosts" in response.json()["error"]["message"]


async def test_names_that_the_operator_lists_pass(serve):
    async with serve(server={"allowed_hosts": ["moe.example", "*.lan"]}) as world:
        for host, status in (("moe.example", 200), ("a.lan:80", 200), ("lan", 400), ("x.example", 400)):
            assert (await world.http.get("/health", headers={"host": host})).status_code == status


async def test_off_loopback_any_name_passes_for_there_are_keys(serve):
    async with serve(server={"host": "0.0.0.0"}) as world:
        assert (await world.http.get("/health", headers={"host": "whatever.example"})).status_code == 200


def test_a_server_answers_to_its_own_address():
    assert allowed("127.0.0.2:8000", known_hosts(ServerSettings(host="127.0.0.2")))
    assert allowed("[::1]:8000", known_hosts(ServerSettings(host="::1")))
    assert known_hosts(ServerSettings(host="0.0.0.0")) == ()


@pytest.mark.parametrize("path", ["/v1/route", "/v1/experts/reverse/promote", "/v1/load_lora_adapter", "/v1/experts"])
@pytest.mark.parametrize("declared", [True, False])
async def test_no_endpoint_reads_more_than_the_limit(serve, path, declared):
    async with serve(server={"max_body_mb": 0.01, "max_upload_mb": 0.1}) as world:
        content = b'{"version": 1, "x": "' + b"x" * 20_000 + b'"}'

        async def chunks():
            yield content[:9_000]
            yield content[9_000:]

        response = await world.http.post(
            path, content=content if declared else chunks(), headers={"content-type": "application/json"}
        )
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"
        assert "0.01 MiB (server.max_body_mb)" in response.json()["error"]["message"]


# Starlette leaves the file that it was reading to the garbage collector.
@pytest.mark.filterwarnings("ignore:.*SpooledTemporaryFile:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("declared", [True, False])
async def test_uploads_have_a_limit_of_their_own(serve, declared):
    async with serve(server={"max_body_mb": 0.01, "max_upload_mb": 0.1}) as world:

        async def upload(size):
            request = world.http.build_request(
                "POST", "/v1/experts", files={"files": ("adapter_config.json", b"x" * size)}
            )
            content = await request.aread()

            async def chunks():
                for start in range(0, len(content), 5_000):
                    yield content[start : start + 5_000]

            headers = {"content-type": request.headers["content-type"]}
            return await world.http.post("/v1/experts", content=content if declared else chunks(), headers=headers)

        assert (await upload(50_000)).status_code == 400  # read, and found to lack its description
        response = await upload(200_000)
        assert response.status_code == 413
        assert "server.max_upload_mb" in response.json()["error"]["message"]
