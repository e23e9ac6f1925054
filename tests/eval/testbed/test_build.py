"""A whole build on a budget of a few steps: its files are valid, its experts are of no use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Queue

import pytest
from typer.testing import CliRunner

from adapters_registry.manifest import read_manifest
from eval.testbed import build as building
from eval.testbed import check as checking
from eval.testbed import cli
from eval.testbed.cli import app
from eval.testbed.tasks import BY_NAME
from eval.testbed.workers import Workers

WORKERS = Workers(ThreadPoolExecutor(1), Queue())  # spares the start of processes


@pytest.fixture(scope="module")
def few_tasks() -> tuple[str, ...]:
    return ("reverse", "roman", "transform-digits")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, few_tasks: tuple[str, ...]) -> Path:
    out = tmp_path_factory.mktemp("testbed") / "out"
    tasks = [BY_NAME[name] for name in few_tasks]
    building.build(out, building.Recipe().scaled(2), WORKERS, tasks=tasks, report=_ignore, measured=_ignore)
    return out


def _ignore(name: str, done: int, total: int, loss: float) -> None:
    assert 0 < done <= total, name


def test_a_build_holds_what_the_manifest_names(built: Path, few_tasks: tuple[str, ...]) -> None:
    manifest = read_manifest(built / "manifest.yaml")
    assert tuple(proposal.name for proposal in manifest.proposals) == few_tasks
    for name in few_tasks:
        config = json.loads((built / "experts" / name / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "moerge/quickstart-base"
        assert (built / "experts" / name / "adapter_model.safetensors").is_file()


def test_its_facts_hold_checksums_and_measurements(built: Path, few_tasks: tuple[str, ...]) -> None:
    facts = json.loads((built / "testbed.json").read_text())
    assert facts["sha256"] == building.checksums(built)
    assert set(facts["measured"]["matrix"]) == set(few_tasks)
    assert str(built) not in json.dumps(facts)


def test_a_second_build_trains_only_what_is_missing(built: Path, few_tasks: tuple[str, ...]) -> None:
    tasks = [BY_NAME[name] for name in few_tasks]
    before = building.checksums(built)
    trained: list[str] = []
    building.build(
        built,
        building.Recipe().scaled(2),
        WORKERS,
        tasks=tasks,
        retrain=("roman",),
        report=lambda name, *_: trained.append(name),
        measured=_ignore,
    )
    assert set(trained) == {"roman"}
    assert building.checksums(built) == before  # seeded: the same weights once more


def test_a_folder_of_another_recipe_is_left_alone(built: Path) -> None:
    with pytest.raises(building.OtherRecipe, match="another seed or schedule"):
        building.build(built, building.Recipe(seed=8), WORKERS, report=_ignore, measured=_ignore)


@contextmanager
def _in_this_process(_: int) -> Iterator[Workers]:
    yield WORKERS


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "processes", _in_this_process)


@pytest.mark.usefixtures("no_processes")
def test_the_check_command_fails_on_a_useless_build(built: Path) -> None:
    result = CliRunner().invoke(app, ["check", "--data", str(built), "--json"])
    assert result.exit_code == 1
    figures = json.loads(result.stdout)
    assert figures["own"]["reverse"] == 0.0
    assert any("reverse reaches 0.000" in problem for problem in figures["problems"])


@pytest.mark.usefixtures("no_processes")
def test_the_check_command_prints_the_matrix(built: Path, few_tasks: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, ["check", "--data", str(built)])
    assert all(name in result.stdout for name in few_tasks)
    assert "base exact match 0.000" in result.stdout


def test_an_unknown_expert_is_refused_before_any_work(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["build", "--out", str(tmp_path / "x"), "--only", "poetry"])
    assert result.exit_code == 2
    assert not (tmp_path / "x").exists()


def test_a_server_that_is_not_there_is_said_so(built: Path) -> None:
    result = CliRunner().invoke(app, ["check", "--data", str(built), "--endpoint", "http://127.0.0.1:9/v1"])
    assert result.exit_code == 2
    assert "does not answer" in result.stderr


def test_shortfalls_are_named() -> None:
    table = checking.Table(base={"a": 0.3, "b": 0.1}, matrix={"a": {"a": 1.0, "b": 0}, "b": {"a": 0, "b": 0.9}})
    assert table.base_mean == pytest.approx(0.2)
    assert [problem.split()[0] for problem in table.failures()] == ["b", "the"]
