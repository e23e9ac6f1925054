"""Rows of the table of blends, on three experts of the testbed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eval import blended as module
from eval import blends
from eval.arena import DATA, Arena
from eval.blended import Blended, Recipe
from eval.blends import COMPOSED, ROWS, Row, columns, in_turn, measure, nearest, prepared, retrieved, share
from eval.testbed.manifest import read_jsonl
from eval.twin import read_deltas
from router.blending import OPERATORS, SEARCHES
from tests.eval.conftest import NAMES, PROMPTS

pytestmark = pytest.mark.usefixtures("one_thread")

SIMILARITY = np.array([[0.9, 0.2, 0.1], [0.1, 0.8, 0.3], [0.2, 0.8, 0.7], [0.0, 0.5, 0.6]])
ALIKE = np.array([[0.5, 0.1, 0.4], [0.2, 0.6, 0.3], [0.7, 0.1, 0.6]])


@pytest.fixture(scope="module")
def arena() -> Arena:
    folders = {name: DATA / "experts" / name for name in NAMES}
    return Arena(DATA, NAMES, PROMPTS, [], folders, SIMILARITY, alike=ALIKE)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only three samples of each expert."""
    monkeypatch.setattr(module, "read_jsonl", lambda path: read_jsonl(path)[:3])


def row(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


def test_every_operator_and_search_has_a_row() -> None:
    assert {row.operator for row in ROWS} == set(OPERATORS)
    assert {row.search for row in ROWS} - {None} == set(SEARCHES)


def test_members_are_a_prompt_s_own_expert_and_those_nearest_to_it(arena: Arena) -> None:
    assert nearest(arena, "roman", 2) == ("roman", "vowels")
    assert nearest(arena, "vowels", 2) == ("roman", "vowels")
    found = columns(arena)
    assert found["2 nearest"][1] == Recipe(("uppercase", "vowels"), (0.5, 0.5))
    assert found["4 nearest"][0] == found["4 at random"][0] == Recipe(NAMES, (1 / 3,) * 3), "there are no more"
    assert found[COMPOSED] == {3: Recipe(("vowels", "uppercase"), (0.5, 0.5))}


def test_retrieval_weighs_on_the_grid(arena: Arena) -> None:
    recipe = retrieved(arena, 0, NAMES)
    assert sum(recipe.weights) == pytest.approx(1)
    exact = np.exp(SIMILARITY[0] / 0.2) / np.exp(SIMILARITY[0] / 0.2).sum()
    assert recipe.members[0] == "roman"
    assert recipe.weights[0] == pytest.approx(exact[0], abs=0.1)
    assert all(weight * 10 == pytest.approx(round(weight * 10)) for weight in recipe.weights)


def test_a_loaded_blend_is_its_members_weighted_sum(arena: Arena) -> None:
    """`loaded` against dW formed densely and added to the weights."""
    recipe = Recipe(("roman", "vowels"), (0.7, 0.3))
    ids = torch.tensor([arena.ids(PROMPTS[0].text)])
    with torch.no_grad():
        before = arena.model(ids).logits
        with Blended(arena).loaded(recipe):
            found = arena.model(ids).logits
        torch.testing.assert_close(arena.model(ids).logits, before, rtol=0, atol=0)
        layers = dict(arena.model.named_modules())
        kept = {name: layer.weight.clone() for name, layer in layers.items() if isinstance(layer, torch.nn.Linear)}
        try:
            for name, weight in zip(*recipe, strict=True):
                for path, delta in read_deltas(arena.folders[name])[0].items():
                    layers[path].weight += weight * delta.float()  # type: ignore[operator]
            torch.testing.assert_close(found, arena.model(ids).logits, rtol=1e-4, atol=1e-4)
        finally:
            for path, weight in kept.items():
                layers[path].weight.copy_(weight)  # type: ignore[operator]


def test_shares_are_of_right_answers(arena: Arena) -> None:
    blended, found = Blended(arena), columns(arena)
    assert list(measure(blended, row("oracle"), found["2 nearest"]).values()) == [True] * 3
    assert not any(measure(blended, row("base model"), found["2 nearest"]).values())
    several = share([True, False, True, True], [("a",), ("a",), ("b",), ("b",)])
    assert several.exact == 0.75
    assert 0 <= several.low <= 0.75 <= several.high <= 1


def test_weights_of_one_and_layers_in_turn(arena: Arena) -> None:
    recipe = columns(arena)["2 nearest"][0]
    assert prepared(Blended(arena), row("`cat`, weights of 1"), 0, recipe).weights == (1, 1)
    assert in_turn(("a", "b"), 4) == {"a": "0-1", "b": "2-3"}
    assert in_turn(("a", "b", "c"), 4) == {"a": "0-0", "b": "1-2", "c": "3-3"}
    assert in_turn(("a", "b", "c"), 2) == {"a": "0-0", "c": "1-1"}


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("name", ["`fisher`", "`regmean`", "`layer_swap`", "`dare_ties`"])
def test_operators_merge_these_members(arena: Arena, name: str) -> None:
    blended = Blended(arena)
    if kind := OPERATORS[row(name).operator].statistic:
        blended.measure(kind, NAMES)
        assert len(blended.statistics[kind]["vowels"]) == 28, "all linear layers, of which it adapts some"
    assert measure(blended, row(name), columns(arena)["2 nearest"]).keys() == {0, 1, 2}


@pytest.mark.usefixtures("few")
def test_a_search_finds_the_expert_that_the_labelled_prompts_are_of(arena: Arena) -> None:
    blended = Blended(arena)
    assert blended.found("soup", ("roman",), ("roman", "vowels"))[0] > 0
    asked: list[Any] = []
    blended.samples = asked.append  # type: ignore[assignment]
    assert blended.found("soup", ("roman",), ("roman", "vowels"))[0] > 0
    assert not asked, "it was found already"


def test_labelled_compositions_are_not_the_measured_ones(arena: Arena) -> None:
    rows = Blended(arena).labelled(("vowels", "uppercase"))
    assert len(rows) == module.LABELLED
    assert PROMPTS[3].text not in {row["prompt"] for row in rows}


def test_the_table_its_file_and_what_is_kept(
    arena: Arena, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(blends, "load", lambda *args, **kwargs: arena)
    blends.main(only=["oracle"], cache=tmp_path / "cache", json_file=tmp_path / "found.json")
    printed = capsys.readouterr().out.splitlines()
    assert printed[2].startswith("| oracle | 1.000 [1.00, 1.00] |")
    (found,) = json.loads((tmp_path / "found.json").read_text())
    assert (found["name"], found["4 nearest"]["exact"], found[COMPOSED]["prompts"]) == ("oracle", 1.0, 1)
    monkeypatch.setattr(blends, "measure", None)
    blends.main(only=["oracle"], cache=tmp_path / "cache")
    assert capsys.readouterr().out.splitlines() == printed
