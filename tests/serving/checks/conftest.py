"""A server with six experts that answer their samples, and adapters to propose."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from adapters_registry.base import BaseSpec
from adapters_registry.expert import Expert, State
from adapters_registry.proposal import FolderSource, Proposal
from adapters_registry.registry import Registry
from router.methods import SERVED
from serving.registration import register

NOUNS = ("banana", "window", "cherry", "castle", "pencil")
#: The experts, and by which words `auto` finds them.
TASKS = {
    "count": "how many letters has {}",
    "double": "repeat twice the word {}",
    "first": "which initial begins {}",
    "reverse": "spell backwards please {}",
    "shout": "write loudly in capitals {}",
    "vowel": "remove consonants out of {}",
}
FRENCH = "say in french {}"


def rows(task: str, answer: str, nouns: Sequence[str] = NOUNS) -> tuple[dict[str, str], ...]:
    """Samples of a task, which `answer` answers with its own name."""
    return tuple({"prompt": task.format(noun), "answer": f"{answer} {noun}"} for noun in nouns)


def names(answer: str) -> Callable[[str], str]:
    """Somebody who answers every prompt as `rows` would have it of `answer`."""
    return lambda prompt: f" {answer} {prompt.split()[-1]}\n"


@pytest.fixture(scope="session")
def many_adapters(make_adapter: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Eight good adapters of about the same norms; tests must not write to them."""
    root = tmp_path_factory.mktemp("many")
    return [make_adapter(root / f"adapter{seed}", seed=100 + seed) for seed in range(8)]


@pytest.fixture(scope="session")
def crowd(tmp_path_factory: pytest.TempPathFactory, base: BaseSpec, many_adapters: list[Path]) -> Path:
    """The data folder of a registry with the six experts, to be copied."""
    folder = tmp_path_factory.mktemp("crowd") / "data"
    with Registry.open(folder, base=base) as registry:
        for (name, task), adapter in zip(TASKS.items(), many_adapters, strict=False):
            proposal = Proposal(name=name, source=FolderSource(path=adapter), samples=rows(task, name))
            with registry.prepare(proposal) as prepared:
                registry.commit(prepared, state=State.ACTIVE)
    return folder


def scaled(source: Path, folder: Path, factor: float) -> Path:
    """The same adapter, so many times as loud."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": config["lora_alpha"] * factor}))
    return folder


@dataclass
class Proposals:
    """Proposes versions to a running server, past HTTP."""

    world: Any
    folder: Path

    async def stage(self, name: str = "french", folder: Path | None = None, **more: Any) -> Expert:
        given = {"samples": rows(FRENCH, name), "new_version": True, **more}
        proposal = Proposal(name=name, source=FolderSource(path=folder or self.folder), **given)
        return await register(self.world.service, proposal, lambda *_: None, stage=True)

    async def check(self, name: str = "french", **params: Any) -> dict[str, Any]:
        response = await self.world.http.post(f"/v1/experts/{name}/check", params=params)
        assert response.status_code == 200, response.text
        report: dict[str, Any] = response.json()
        return report


def section(report: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in report["sections"] if each["name"] == name)
    return found


#: The quickest method alone: what is tested here is what becomes of its decisions.
ROUTER = {"method": "retrieval", "methods": {name: None for name in SERVED if name != "retrieval"}}


@pytest.fixture
def running(serve: Any, crowd: Path, tmp_path: Path) -> Callable[..., Any]:
    """`async with running(**settings) as world`: a server on a copy of the crowd, the same one at a restart."""
    shutil.copytree(crowd, tmp_path / "data")
    return partial(serve, router=ROUTER)


@pytest.fixture
async def proposals(running: Any, many_adapters: list[Path]) -> AsyncIterator[Proposals]:
    async with running() as world:
        yield Proposals(well_informed(world), many_adapters[6])


def well_informed(world: Any) -> Any:
    """Everybody answers their own samples, and the base model none."""
    world.engine.says |= {name: names(name) for name in (*TASKS, "french")}
    return world
