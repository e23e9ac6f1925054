"""What decides what is built: which recipes are the same, what a plan refuses, and what is found on disk."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from adapters_registry.expert import Expert, State
from router.adapter import Adapter
from router.blending import BlendError
from router.composite import CompositeError
from router.decision import Decision, Weighted
from serving.recipes import Pantry, kept, layout_of, recipe_of


@pytest.fixture(scope="module")
def experts(adapters):
    """Four experts of rank 4; `e` is `a` under another name."""
    return {
        name: Expert(
            name=name,
            version=1,
            digest=hashlib.sha256(str(path).encode()).hexdigest(),
            state=State.ACTIVE,
            path=path,
            base_model="tiny",
            rank=4,
            target_modules=("q_proj", "v_proj"),
            source="test",
        )
        for name, path in zip("abcde", [*adapters, adapters[0]], strict=True)
    }


@pytest.fixture
def pantry(experts):
    by_id = {expert.id: expert for expert in experts.values()}
    return Pantry(by_id.__getitem__, lambda expert, key: None, max_rank=12)


@pytest.fixture
def gated(experts):
    def decide(names, gate="arrow", **settings):
        members = tuple(Weighted(expert=name, id=experts[name].id, weight=1 / len(names)) for name in names)
        return Decision(method=gate, kind="gate", experts=members, gate=gate, gate_settings=settings)

    return decide


@pytest.fixture
def blended(experts):
    def decide(weights, operator="cat", **settings):
        members = tuple(Weighted(expert=name, id=experts[name].id, weight=w) for name, w in weights.items())
        merged = {"operator": operator, "operator_settings": settings}
        return Decision(method="retrieval", kind="blend", experts=members, **merged)

    return decide


def digests(pantry, *decisions):
    return [recipe_of(decision).plan(pantry).digest for decision in decisions]


def test_other_members_order_gate_or_settings_are_another_composite(pantry, gated):
    decisions = [gated("ab"), gated("cd"), gated("dc"), gated("ac"), gated("ab", "spectr"), gated("ab", top_k=1)]
    assert len(set(digests(pantry, *decisions))) == len(decisions)


def test_other_members_weights_operator_or_settings_are_another_blend(pantry, blended):
    decisions = [
        blended({"a": 0.5, "b": 0.5}),
        blended({"a": 0.5, "c": 0.5}),
        blended({"a": 0.6, "b": 0.4}),
        blended({"a": 0.5, "b": 0.5}, "ties"),
        blended({"a": 0.5, "b": 0.5}, "ties", density=0.3),
    ]
    assert len(set(digests(pantry, *decisions))) == len(decisions)


def test_the_order_of_a_blend_s_members_does_not_matter(pantry, blended):
    one, other = blended({"a": 0.6, "b": 0.4}), blended({"b": 0.4, "a": 0.6})
    assert recipe_of(one) == recipe_of(other)


def test_the_same_adapter_under_two_names_is_one_member_with_both_weights(pantry, blended, experts, tmp_path):
    decision = blended({"a": 0.5, "e": 0.3, "b": 0.2})
    folder = tmp_path / "built"
    folder.mkdir()
    recipe = recipe_of(decision)
    assert set(recipe.members) == {experts[name].id for name in "abe"}  # whoever of them leaves takes the blend along
    recipe.plan(pantry).build(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "blend.json",
    ]
    a, b, both = (Adapter(each) for each in (experts["a"].path, experts["b"].path, folder))
    assert both.config.r == 8
    for module in both.modules:
        torch.testing.assert_close(both.dense(module), 0.8 * a.dense(module) + 0.2 * b.dense(module))


@pytest.mark.parametrize(
    ("names", "gate", "settings", "says"),
    [
        ("a", "arrow", {}, "at least two"),
        ("aa", "arrow", {}, "2 times"),
        ("ae", "arrow", {}, "the same adapter"),
        ("abcd", "arrow", {}, "over the engine's limit of 12"),
        ("ab", "nonsense", {}, "nonsense"),
        ("ab", "arrow", {"top_k": 0}, "top_k"),
        ("ab", "phatgoose", {}, "moerge gates train a"),
        ("ab", "evidence", {}, "moerge gates calibrate a"),
        ("ab", "constant", {"weights": [1.0, 0.5, 0.2]}, "3 weights for 2 members"),
    ],
)
def test_a_composite_that_cannot_be_built_says_why(pantry, gated, names, gate, settings, says):
    with pytest.raises(CompositeError) as caught:
        recipe_of(gated(names, gate, **settings)).plan(pantry)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "operator", "settings", "says"),
    [
        ({"a": float("nan"), "b": 1.0}, "cat", {}, ["weights are finite numbers"]),
        ({"a": 0.0, "b": 0.0}, "cat", {}, ["All weights are zero"]),
        ({"a": 1.0, "b": 1.0}, "nonsense", {}, ["No operator 'nonsense'"]),
        ({"a": 1.0, "b": 1.0}, "ties", {"density": 1.5}, ["density"]),
        ({"a": 1.0, "b": 1.0}, "cat", {"rank": 99}, ["rank 99 is over the engine's limit of 12"]),
        ({"a": 1.0, "b": 1.0}, "fisher", {}, ["moerge expert stats a", "moerge expert stats b"]),
        ({"a": 1.0, "b": 1.0}, "regmean", {"rank": 99}, ["moerge expert stats a", "rank 99"]),
    ],
)
def test_a_blend_that_cannot_be_built_says_every_reason(pantry, blended, weights, operator, settings, says):
    with pytest.raises(BlendError) as caught:
        recipe_of(blended(weights, operator, **settings)).plan(pantry)
    assert [each for each in says if each not in str(caught.value)] == []


def test_only_the_statistics_that_an_operator_needs_are_read(experts, blended):
    asked = []
    by_id = {expert.id: expert for expert in experts.values()}
    pantry = Pantry(by_id.__getitem__, lambda expert, key: asked.append((expert.name, key)), max_rank=12)
    recipe_of(blended({"a": 0.5, "b": 0.5})).plan(pantry)
    assert asked == []
    with pytest.raises(BlendError):
        recipe_of(blended({"a": 0.5, "b": 0.5}, "regmean")).plan(pantry)
    assert asked == [("a", "gram"), ("b", "gram")]


def test_what_somebody_gives_is_like_nothing_else(gated, experts):
    stored = {experts[name].id: {"arrow": {"x": np.zeros(1)}} for name in "ab"}
    assert recipe_of(gated("ab"), stored) != recipe_of(gated("ab"), stored)
    assert recipe_of(gated("ab")) == recipe_of(gated("ab"))


def test_folders_say_what_they_hold(pantry, gated, blended, experts, tmp_path):
    for name, decision in {"one": gated("ab"), "other": blended({"a": 0.5, "b": 0.5}, "ties")}.items():
        (tmp_path / name).mkdir()
        recipe_of(decision).plan(pantry).build(tmp_path / name)
    one, other = kept(tmp_path / "one"), kept(tmp_path / "other")
    assert (one.kind, one.adapter.name) == ("composite", "auto:arrow@one")
    assert (other.kind, other.adapter.name) == ("blend", "blend:ties@other")
    assert one.members == other.members == {experts[name].id for name in "ab"}
    assert layout_of(tmp_path / "other") is None
    assert kept(experts["a"].path) is None
