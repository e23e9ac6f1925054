"""The testbed as an arena: what is asked of which experts, and composites of some of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from eval.arena import DATA, Arena, Prompt, load, only
from eval.twin import Composite
from tests.eval.conftest import NAMES, PROMPTS

pytestmark = pytest.mark.usefixtures("one_thread")

SIMILARITY = np.array([[0.9, 0.2, 0.1], [0.1, 0.8, 0.3], [0.2, 0.1, 0.7], [0.0, 0.5, 0.6]])


@pytest.fixture(scope="module")
def arena() -> Arena:
    folders = {name: DATA / "experts" / name for name in NAMES}
    return Arena(DATA, NAMES, PROMPTS, [("roman", "Roman for 9?")], folders, SIMILARITY)


def test_what_a_prompt_is_for() -> None:
    assert [prompt.told for prompt in PROMPTS] == ["instruction"] * 3 + ["composition"]
    assert Prompt("Convert: abc", "aabbcc", ("transform-lower",)).told == "input"


def test_retrieval_shortlists_and_weighs(arena: Arena) -> None:
    assert arena.shortlists(2) == [NAMES[:2], NAMES[1:], ("roman", "vowels"), NAMES[1:]]
    assert arena.owned().tolist() == [0, 1, 2, 2]
    expected = np.exp(SIMILARITY / 0.5)
    np.testing.assert_allclose(arena.prior(0.5), expected / expected.sum(1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("gate", ["arrow", "phatgoose"])
def test_a_part_of_a_composite_is_the_composite_of_a_part(arena: Arena, gate: str) -> None:
    chosen = ("roman", "vowels")
    kept = {name: {gate: {m: torch.ones(128) for m in ("model.layers.0.self_attn.q_proj",)}} for name in NAMES}
    small = only(Composite.stack(arena.folders, gate, {}, kept), chosen)
    alone = Composite.stack({name: arena.folders[name] for name in chosen}, gate, {}, kept)
    assert small.layout == alone.layout
    for module, pair in alone.factors.items():
        torch.testing.assert_close(small.factors[module], pair, rtol=0, atol=0)
    for name, table in alone.tables.items():
        torch.testing.assert_close(small.tables[name], table, rtol=0, atol=0)


def test_answers_are_those_of_the_expert_with_all_the_weight(arena: Arena) -> None:
    given = torch.eye(3)[[0, 1, 2, 2]]
    replies = arena.answers("constant", {}, [NAMES] * 4, given)
    assert arena.right(replies)[:3].tolist() == [1.0, 1.0, 1.0]
    listed = arena.answers("constant", {}, arena.shortlists(2), given)
    assert listed == replies, "an expert answers the same in any company"


def test_evidence_is_of_the_members_alone(arena: Arena) -> None:
    settings = {"normalise": "none"}
    everyone = arena.evidence(settings, [NAMES] * 4)
    listed = arena.evidence(settings, arena.shortlists(2))
    outside = torch.tensor([[name not in members for name in NAMES] for members in arena.shortlists(2)])
    torch.testing.assert_close(listed, everyone.masked_fill(outside, float("-inf")), rtol=1e-4, atol=1e-3)
    last = arena.evidence(settings, [NAMES] * 4, decay=0.0)
    assert ((last > 0) & (last < everyone)).all(), "lengths, of which fewer are added up"


def test_prompts_to_choose_settings_on_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.arena.similarities", lambda names, samples, texts: np.zeros((len(texts), len(names))))
    drawn, others = load(2), load(2, compositions=False, others=True)
    assert len(drawn.prompts) == 2 * len(drawn.names) + 96
    assert len(others.prompts) == 58 * len(others.names)
    assert not {replace(prompt, answer="") for prompt in drawn.prompts} & {
        replace(prompt, answer="") for prompt in others.prompts
    }
