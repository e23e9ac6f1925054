from __future__ import annotations

import json
import math

import pytest

from router.triggers import Shift, Step, changes, shift


def steps(*said: tuple[str, float, float]) -> list[Step]:
    """One step for each: the token, its log-probability, and that of one other, `x`."""
    return [(token, {token: likely, "x": other}) for token, likely, other in said]


def test_the_same_answers_are_no_shift() -> None:
    one = [steps(("a", -0.1, -3), ("b", -0.2, -4)), steps(("c", -1, -2))]
    assert shift(one, one) == Shift(0.0, 0.0, 2)


def test_it_is_the_mean_over_tokens_steps_and_prompts() -> None:
    base = [steps(("a", -0.5, -3), ("b", -0.25, -4)), steps(("c", -1, -2))]
    tried = [steps(("a", -1.0, -2), ("b", -0.25, -4)), steps(("c", -1, -4))]
    found = shift(base, tried)
    assert found.nats == pytest.approx((((0.5 + 1) / 2 + 0) / 2 + 2 / 2) / 2)
    assert (found.parted, found.prompts) == (0, 2)


def test_what_comes_after_the_answers_part_does_not_count() -> None:
    base = [steps(("a", -0.5, -3), ("b", -0.5, -1), ("c", -0.1, -9))]
    tried = [steps(("a", -0.5, -3), ("x", -2.5, -0.5), ("z", -7.0, -1))]
    tried[0][1][1]["b"] = -2.5
    assert list(changes(base[0], tried[0])) == [0, pytest.approx((2 + 0.5) / 2)]
    assert shift(base, tried).parted == 1


def test_a_token_that_is_not_listed_counts_for_what_it_has_changed_at_least() -> None:
    base: list[Step] = [("a", {"a": -0.1, "b": -3.0})]
    tried: list[Step] = [("c", {"c": -0.2, "d": -2.0})]
    # a: from -0.1 to -2 or less; b: -3, might be the same; c, d: from -3 or less to -0.2 and -2
    assert list(changes(base, tried)) == [pytest.approx((1.9 + 0 + 2.8 + 1.0) / 4)]


def test_prompts_that_the_engine_did_not_answer_are_left_out() -> None:
    base, tried = [steps(("a", -1, -2)), [], steps(("a", -1, -2))], [steps(("a", -2, -2)), steps(("a", -1, -2)), []]
    assert shift(base, tried) == Shift(0.5, 0.0, 1)
    assert shift([], []) == shift([[]], [[]]) == Shift(0.0, 0.0, 0)


def test_broken_figures_are_told() -> None:
    found = shift([steps(("a", -1, -2))], [steps(("a", math.nan, -2))])
    assert math.isnan(found.nats)
    assert json.loads(json.dumps(found.json())) == {"nats": None, "parted": 0.0, "prompts": 1}
