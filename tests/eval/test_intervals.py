from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from eval.intervals import FEW, Groups, estimate


def mean_of(values: np.ndarray):
    return lambda rows: float(values[rows].mean())


def test_of_independent_prompts_it_is_the_binomial_interval() -> None:
    values = np.random.default_rng(0).random(400) < 0.3
    found = estimate(mean_of(values), [Groups(range(400))])
    low, high = binom.interval(0.95, 400, values.mean())
    assert found.value == values.mean()
    assert (found.low, found.high) == pytest.approx((low / 400, high / 400), abs=0.008)


def test_prompts_that_stand_or_fall_together_make_it_wider() -> None:
    labels = np.repeat(np.arange(40), 25)
    values = labels % 2 == 0
    alone, together = estimate(mean_of(values), [Groups(range(1000))]), estimate(mean_of(values), [Groups(labels)])
    assert together.high - together.low > 4 * (alone.high - alone.low)  # sqrt(25) = 5 times
    assert together.value == alone.value == 0.5


def test_few_groups_are_taken_apart() -> None:
    values = np.arange(4 * (FEW - 1)) % 4 == 0
    few = Groups(np.repeat(np.arange(FEW - 1), 4))
    assert len(few) == len(values)
    assert estimate(mean_of(values), [few]) == estimate(mean_of(values), [Groups(range(len(values)))])


def test_it_is_the_same_every_time_and_another_with_another_seed() -> None:
    values = np.random.default_rng(0).random(100)
    groups = [Groups(range(100))]
    assert estimate(mean_of(values), groups) == estimate(mean_of(values), groups)
    assert estimate(mean_of(values), groups) != estimate(mean_of(values), groups, seed=1)


def test_a_paired_difference_is_narrower_than_the_figures_it_is_of() -> None:
    rng = np.random.default_rng(0)
    ours = rng.random(300)
    theirs = ours - 0.01 * rng.random(300)
    difference = estimate(lambda rows: float((ours[rows] - theirs[rows]).mean()), [Groups(range(300))])
    alone = estimate(mean_of(ours), [Groups(range(300))])
    assert 0 < difference.low < difference.value < difference.high < 0.01
    assert difference.high - difference.low < (alone.high - alone.low) / 10


def test_populations_are_drawn_apart_from_each_other() -> None:
    a, b = np.random.default_rng(0).random((2, 200))
    found = estimate(lambda rows, others: a[rows].mean() - b[others].mean(), [Groups(range(200))] * 2)
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.sqrt(2 / 12 / 200), rel=0.15)


def test_of_a_single_prompt_there_is_no_interval() -> None:
    found = estimate(mean_of(np.ones(1)), [Groups(["a"])])
    assert found.json() == {"value": 1.0, "low": 1.0, "high": 1.0}
