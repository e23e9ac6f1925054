"""Rows of the table of gates, on three experts of the testbed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eval import gates
from eval.arena import DATA, Arena
from eval.gates import ROWS, Row, measure, prepare
from router.gate_training import Schedule
from tests.eval.conftest import NAMES, PROMPTS, SAMPLES

pytestmark = pytest.mark.usefixtures("one_thread")

SIMILARITY = np.array([[0.9, 0.2, 0.1], [0.1, 0.8, 0.3], [0.2, 0.8, 0.7], [0.0, 0.5, 0.6]])  # the third is wrong


@pytest.fixture(scope="module")
def arena() -> Arena:
    folders = {name: DATA / "experts" / name for name in NAMES}
    arena = Arena(DATA, NAMES, PROMPTS, SAMPLES, folders, SIMILARITY)
    prepare(arena, [row for row in ROWS if row.name == "probe"], None)
    return arena


def row(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


def test_shares_are_of_the_prompts_of_each_kind(arena: Arena) -> None:
    base, oracle, retrieval = (measure(arena, row(n), "all") for n in ("base model", "oracle", "retrieval: select"))
    assert (oracle.exact, oracle.instruction, oracle.input, oracle.routed) == (1, 1, None, 1)
    assert base.routed is None
    assert base.exact is not None
    assert base.exact < 1
    assert retrieval.routed == pytest.approx(2 / 3)
    assert oracle.composition == 0


def test_a_probe_decides_on_one_expert(arena: Arena) -> None:
    """When evidence counts next to nothing, on the one that retrieval finds most alike."""
    sets = [NAMES] * 4
    alone = gates.probed(arena, sets, Row("probe", decides=gates.probed))
    assert alone.sum(1).tolist() == [1] * 4
    decided = gates.probed(arena, sets, Row("probe", settings={"beta": 1e-9}, prior=True, decides=gates.probed))
    assert decided.argmax(1).tolist() == [0, 1, 1, 2]
    assert measure(arena, row("probe, prior"), "shortlist").routed is not None


@pytest.mark.parametrize("name", ["arrow", "evidence, prior", "retrieval: mixture"])
def test_gates_that_weigh_tokens_route_nothing(arena: Arena, name: str) -> None:
    found = measure(arena, row(name), "all")
    assert found.routed is None
    assert found.exact is not None


@pytest.mark.parametrize("gate", ["phatgoose", "meteora"])
def test_trained_vectors_are_kept_in_a_folder(
    gate: str, arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "Schedule", lambda: Schedule(steps=1, batch=1))
    prepare(arena, [row(gate)], tmp_path)
    first = {name: dict(arena.kept[name][gate]) for name in NAMES}

    def never(*args: Any) -> Any:
        raise AssertionError("they are trained already")

    monkeypatch.setattr(gates, "train", never)
    prepare(arena, [row(gate)], tmp_path)
    for name in NAMES:
        torch.testing.assert_close(dict(arena.kept[name][gate]), first[name], rtol=0, atol=0)
    assert not any(".mlp." in module for module in first["vowels"]), "which adapts attention only"
    assert measure(arena, row(gate), "all").routed is None


def test_the_table_and_its_file(
    arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gates, "load", lambda *args, **kwargs: arena)
    gates.main(only=["oracle"], json_file=tmp_path / "found.json")
    assert capsys.readouterr().out.splitlines()[2] == "| oracle | all | 1.000 | 1.000 |  | 0.000 | 1.000 |"
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert (found["name"], found["exact"], found["input"]) == ("oracle", 1.0, None)
