"""A server in a thread on a loopback port, with an engine that only says who would have answered."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from adapters_registry.base import BaseSpec
from adapters_registry.expert import Sample, State
from adapters_registry.proposal import FolderSource, Proposal
from adapters_registry.registry import Registry
from serving import run
from serving.cli import app

QUICKSTART = Path("eval/testbed/data")


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """Of the quickstart's base model: `uppercase` and `vowels` with samples, `json` without."""
    base = BaseSpec.from_pretrained(QUICKSTART / "base", name="base", aliases={"moerge/quickstart-base"})
    with Registry.open(tmp_path / "data" / "base", base=base) as opened:
        for name in ("uppercase", "vowels", "json"):
            rows = (QUICKSTART / "samples" / f"{name}.jsonl").read_text().splitlines()[:4]
            samples = () if name == "json" else tuple(Sample(**json.loads(row)) for row in rows)
            proposal = Proposal(
                name=name, source=FolderSource(path=(QUICKSTART / "experts" / name).resolve()), samples=samples
            )
            with opened.prepare(proposal) as prepared:
                opened.commit(prepared, state=State.ACTIVE)
        yield opened


@pytest.fixture
def offline(tmp_path: Path, registry: Registry) -> Callable[..., Result]:
    """`offline(...)`: the command line on that registry, for commands that need no server."""
    env = {
        "MOERGE_BASE_MODEL__PATH": str((QUICKSTART / "base").resolve()),
        "MOERGE_BASE_MODEL__ALIASES": '["moerge/quickstart-base"]',
        "MOERGE_REGISTRY__DATA_DIR": str(tmp_path / "data"),
    }

    def moerge(*words: str) -> Result:
        return CliRunner().invoke(app, list(words), env=env)

    return moerge


@dataclass
class Served:
    """A running server that commands talk to; `moerge(...)` is the command line with its URL."""

    url: str
    engine: Any
    folder: Path
    moerge: Callable[..., Result]


def command_line(url: str) -> Callable[..., Result]:
    def moerge(*words: str, **options: Any) -> Result:
        return CliRunner().invoke(app, [str(word) for word in words], env={"MOERGE_URL": url}, **options)

    return moerge


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def nobody() -> Callable[..., Result]:
    """`nobody(...)`: the command line with the URL of a port where nobody listens."""
    return command_line(f"http://127.0.0.1:{free_port()}")


@pytest.fixture(scope="module")
def served(
    library: Path, adapters: list[Path], make_service: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """`moerge serve`'s own start and stop around it; one server for a file of tests."""
    folder = tmp_path_factory.mktemp("served") / "data"
    shutil.copytree(library, folder)
    port = free_port()
    servers: list[run.Server] = []
    ready = threading.Event()

    class Remembered(run.Server):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            servers.append(self)

    service = make_service(folder, server={"port": port})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "build_service", lambda plan: service)
        patch.setattr(run, "Server", Remembered)
        plan = run.Plan(service.settings, service.settings.base_model, ())
        thread = threading.Thread(target=run.serve, args=(plan, lambda _: ready.set(), lambda *_: None))
        thread.start()
        assert ready.wait(30)
        url = f"http://127.0.0.1:{port}"
        assert httpx.get(f"{url}/health").status_code == 200
        yield Served(url, service.engine, folder, command_line(url))
        servers[0].should_exit = True
        thread.join(30)
        assert not thread.is_alive()
