"""What dies, and comes back. Last in this folder: it kills the engine that the other tests use."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time

import httpx
import pytest
from safetensors.torch import load_file, save

from serving.bench import served

OPTIONS = ("--slots", "4", "--max-rank", "16")
pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

QUESTION = {"model": "auto", "messages": [{"role": "user", "content": "Spell banana backwards"}], "max_tokens": 20}


def engine_cores(server):
    return [each for each in server.processes("EngineCore") if each.is_running()]


def test_a_killed_engine_is_a_clear_503_and_then_it_is_back(server):
    assert server.http.post("/v1/chat/completions", json=QUESTION).status_code == 200
    cores = engine_cores(server)
    assert cores
    for core in cores:
        core.kill()
    statuses = set()
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        response = server.http.post("/v1/chat/completions", json=QUESTION)
        statuses.add(response.status_code)
        if response.status_code == 200 and 503 in statuses:
            break
        if response.status_code != 200:
            assert response.status_code == 503, response.text
            assert response.json()["error"]["code"] == "engine_unavailable"
            assert response.headers["retry-after"]
            assert server.http.get("/health").status_code == 200
        time.sleep(0.5)
    assert statuses == {200, 503}
    assert server.http.get("/ready").status_code == 200
    assert response.json()["choices"][0]["message"]["content"].strip() == "ananab"


def test_kill_9_while_experts_are_registered_leaves_each_whole_or_absent(server, testbed, tmp_path):
    """Uploads are under way when the server dies; the next start has whole experts, and serves them."""
    adapter = testbed.folder / "experts" / "reverse"
    weights = load_file(adapter / "adapter_model.safetensors")
    config = (adapter / "adapter_config.json").read_bytes()

    def upload(number: int) -> None:
        content = save({key: value * (1 + number / 1000) for key, value in weights.items()})
        about = {"name": f"late-{number}", "samples": [f"zebra {number} on the glacier"]}
        files = [("files", ("adapter_config.json", config)), ("files", ("adapter_model.safetensors", content))]
        with contextlib.suppress(httpx.HTTPError):
            httpx.post(f"{server.url}/v1/experts", data={"expert": json.dumps(about)}, files=files, timeout=60)

    threads = [threading.Thread(target=upload, args=(number,)) for number in range(1, 9)]
    for thread in threads:
        thread.start()
    time.sleep(0.4)
    (main,) = server.processes("serving.cli")
    for process in [*main.children(recursive=True), main]:
        process.send_signal(signal.SIGKILL)
    for thread in threads:
        thread.join()

    with served(testbed.folder / "manifest.yaml", server.folder, *OPTIONS) as (url, _):
        experts = httpx.get(f"{url}/v1/experts").json()["data"]
        late = [each["name"] for each in experts if each["name"].startswith("late-")]
        assert {each["name"] for each in experts} - set(late) == set(testbed.tests)
        for name in late:
            body = {**QUESTION, "model": name}
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
            assert answer["choices"][0]["message"]["content"].strip()
        store = next((server.folder / "data").glob("*/adapters"))
        kept = {each.name for each in store.iterdir() if each.is_dir() and not each.name.startswith(".")}
        assert kept == {each["digest"] for each in experts}
