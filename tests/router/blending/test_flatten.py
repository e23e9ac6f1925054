"""Blends of blends are taken apart exactly, or refused."""

from __future__ import annotations

import math
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from router.adapter import Adapter
from router.blending import OPERATORS, BlendError, blend
from router.blending.flatten import SUMS, Nested, coefficients, flatten
from router.composite import Part

EXPERTS = ("a@1", "b@2", "c@3", "d@4")
POSITIVE = st.floats(0.01, 10)
WEIGHTS = st.floats(-10, 10).filter(lambda x: abs(x) > 0.01)


@st.composite
def nested(draw: st.DrawFn, operators: tuple[str, ...] = SUMS) -> Nested:
    operator = draw(st.sampled_from(operators))
    members = draw(st.dictionaries(st.sampled_from(EXPERTS), POSITIVE, min_size=1))
    settings = {"scale": draw(WEIGHTS)} if operator == "task_arithmetic" else {}
    return Nested("inner", members, operator, settings)


def vector(name: str) -> torch.Tensor:
    """An expert's dW, so that sums can be compared."""
    return torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(ord(name[0])))


def update_of(blend: Nested) -> torch.Tensor:
    """What the operator's own formula gives."""
    weights = list(blend.members.values())
    chosen = OPERATORS[blend.operator](OPERATORS[blend.operator].Settings.model_validate(blend.settings))
    weighed = zip(blend.members, chosen.weigh(weights), strict=True)
    scale = getattr(chosen.settings, "scale", 1.0)
    return torch.stack([scale * weight * vector(each) for each, weight in weighed]).sum(0)


@given(st.lists(st.tuples(nested() | st.sampled_from(EXPERTS), WEIGHTS), min_size=1, max_size=4))
def test_a_sum_of_sums_is_the_sum_of_the_members(ingredients: list[tuple[Any, float]]) -> None:
    flat = flatten(ingredients, "cat")
    expected = torch.stack(
        [w * (vector(each) if isinstance(each, str) else update_of(each)) for each, w in ingredients]
    )
    found = torch.stack([w * vector(each) for each, w in flat.items()])
    torch.testing.assert_close(found.sum(0), expected.sum(0), rtol=1e-9, atol=1e-9)


@given(nested(("smear",)), nested(("smear",)), POSITIVE, POSITIVE)
def test_an_average_of_averages_is_an_average(one: Nested, two: Nested, first: float, second: float) -> None:
    flat = Nested("outer", flatten([(one, first), (two, second)], "smear"), "smear")
    expected = (first * update_of(one) + second * update_of(two)) / (first + second)
    torch.testing.assert_close(update_of(flat), expected, rtol=1e-9, atol=1e-9)


@given(st.lists(st.tuples(nested(("cat",)) | st.sampled_from(EXPERTS), WEIGHTS), min_size=2, max_size=3))
def test_order_does_not_matter(ingredients: list[tuple[Any, float]]) -> None:
    flat = [flatten(each, "cat") for each in permutations(ingredients)]
    assert all(each == flat[0] for each in flat)


@given(st.dictionaries(st.sampled_from(EXPERTS), WEIGHTS, min_size=1))
def test_experts_alone_stay_as_they_are(weights: dict[str, float]) -> None:
    expected = {each: round(weight, 12) for each, weight in weights.items()}
    assert flatten(list(weights.items()), "ties") == expected


def test_one_expert_s_weights_add_up_and_may_cancel() -> None:
    assert flatten([("a@1", 0.1), ("b@2", 1.0), ("a@1", 0.2), ("a@1", -0.3)], "ties") == {"b@2": 1.0}
    assert flatten([("a@1", 0.5), ("a@1", -0.5)], "cat") == {"a@1": 0.0}, "said to be all zero by who makes it"
    assert flatten([(Nested("in", {"a@1": 0.1}), 0.7)], "cat") == {"a@1": 0.07}


@pytest.mark.parametrize("operator", sorted(OPERATORS.keys() - set(SUMS)))
def test_what_is_no_sum_is_refused_on_either_side(operator: str) -> None:
    with pytest.raises(BlendError, match="which is no weighted sum"):
        flatten([(Nested("in", {"a@1": 1.0}), 1.0)], operator)
    with pytest.raises(BlendError, match="no weighted sum of its members"):
        flatten([(Nested("in", {"a@1": 1.0}, operator), 1.0)], "cat")


def test_every_reason_is_given() -> None:
    cut = Nested("cut", {"a@1": 1.0}, "cat", {"rank": 4})
    ties = Nested("ties", {"a@1": 1.0}, "ties")
    with pytest.raises(BlendError) as refused:
        flatten([(cut, 1.0), (ties, 1.0), ("a@1", 1.0)], "cat")
    assert len(refused.value.reasons) == 2
    with pytest.raises(BlendError, match="do not add up to 1"):
        flatten([(Nested("half", {"a@1": 0.5}), 1.0)], "smear")
    assert flatten([(Nested("whole", {"a@1": 0.5, "b@2": 0.5}), 2.0)], "smear") == {"a@1": 1.0, "b@2": 1.0}


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_stays_none(weight: float) -> None:
    assert not math.isfinite(flatten([("a@1", weight), ("b@2", 1.0)], "cat")["a@1"])
    assert not math.isfinite(flatten([("a@1", math.inf), ("a@1", -math.inf)], "cat")["a@1"])
    assert not math.isfinite(flatten([("a@1", 1e308), ("a@1", 1e308)], "cat")["a@1"])


def test_the_flat_blend_is_the_blend_of_the_blend(tmp_path: Path, adapters: list[Path], one_thread: None) -> None:
    a, b, c = (Part(f"{name}@x", f"{name}" * 64, path) for name, path in zip("abc", adapters, strict=False))
    inner = Nested("inner", {"a@x": 0.3, "b@x": -0.5}, "task_arithmetic", {"scale": 0.7})
    blend(tmp_path / "inner", [a, b], [0.3, -0.5], "task_arithmetic", {"scale": 0.7}, max_rank=64)
    blend(tmp_path / "twice", [Part("in@x", "f" * 64, tmp_path / "inner"), a, c], [2.0, 0.1, 1.0], "cat", max_rank=64)
    flat = flatten([(inner, 2.0), ("a@x", 0.1), ("c@x", 1.0)], "cat")
    blend(tmp_path / "flat", [a, b, c], [flat[each.id] for each in (a, b, c)], "cat", max_rank=64)
    once, twice = Adapter(tmp_path / "flat"), Adapter(tmp_path / "twice")
    assert once.names.A.keys() == twice.names.A.keys()
    for module in once.names.A:
        torch.testing.assert_close(once.dense(module), twice.dense(module))


def test_only_sums_have_coefficients() -> None:
    assert coefficients(Nested("x", {"a@1": 1.0, "b@2": 3.0}, "smear")) == {"a@1": 0.25, "b@2": 0.75}
    assert coefficients(Nested("x", {"a@1": 1.0}, "task_arithmetic", {"scale": 0.5})) == {"a@1": 0.5}
