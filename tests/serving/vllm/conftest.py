"""One real server for all of this folder: `moerge serve` on the quickstart testbed, 16 experts on 4 slots."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from serving.bench import served

TESTBED = Path(__file__).parents[3] / "eval" / "testbed" / "data"
SLOTS = 4
#: Tools as a user would switch them on; so small a model would fill any white space that JSON allows.
VLLM = {
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
    "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
}
#: Beside what is served anyway, a method whose best three experts answer together.
METHODS = {"centroids": {"top_k": 3, "spread": 1.0, "threshold": -1}}
OPTIONS = ("--slots", str(SLOTS), "--max-rank", "64")  # four experts of rank 16 in one composite

PROMPT = "Spell banana backwards"
MESSAGES = [{"role": "user", "content": PROMPT}]


def chat(server: Any, model: str = "auto", status: int = 200, **more: Any) -> Any:
    body = {"model": model, "messages": MESSAGES, "temperature": 0, "max_tokens": 40, **more}
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == status, response.text
    return response


def said(response: Any) -> str:
    return str(response.json()["choices"][0]["message"]["content"]).strip()


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@dataclass
class Testbed:
    """The shipped prompts by expert, and which experts are told apart by their instructions."""

    folder: Path
    tests: dict[str, list[dict[str, str]]]
    instruction_told: frozenset[str]

    __test__ = False


@pytest.fixture(scope="session")
def testbed() -> Testbed:
    from adapters_registry.manifest import read_manifest

    proposals = read_manifest(TESTBED / "manifest.yaml").proposals
    tests = {each.name: rows(TESTBED / "test" / f"{each.name}.jsonl") for each in proposals}
    told = frozenset(each.name for each in proposals if "instruction-told" in (each.tags or ()))
    return Testbed(TESTBED, tests, told)


@dataclass
class Served:
    """A running server."""

    url: str
    startup_s: float
    folder: Path
    http: httpx.Client
    openai: openai.OpenAI

    def processes(self, name: str) -> list[psutil.Process]:
        """This server's processes with `name` in their command line or title."""
        found = []
        for each in psutil.Process(os.getpid()).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # gone meanwhile, or waiting for its parent to notice
                if name in " ".join(each.cmdline()) or name in each.name():
                    found.append(each)
        return found


@pytest.fixture(scope="session")
def server(testbed: Testbed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("server")
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:  # for the server's start only: other tests read the environment
            patch.setenv("MOERGE_ENGINE__RESIDENT", "6")  # fewer than the experts, so that they come and go
            patch.setenv("MOERGE_ENGINE__VLLM", json.dumps(VLLM))
            patch.setenv("MOERGE_ROUTER__METHODS", json.dumps(METHODS))
            url, seconds = stack.enter_context(served(testbed.folder / "manifest.yaml", folder, *OPTIONS))
        http = stack.enter_context(httpx.Client(base_url=url, timeout=120))
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        yield Served(url, seconds, folder, http, client)


@pytest.fixture(scope="session", autouse=True)
def _offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield
