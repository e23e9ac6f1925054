from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from router.blending import lorahub, soup


def test_the_greedy_soup_takes_members_best_first_while_they_help() -> None:
    """Scores: member 1 alone is best, 2 helps it, 0 spoils the soup, 3 makes no difference and stays."""
    asked = []

    def score(weights: Sequence[float]) -> float:
        asked.append(tuple(weights))
        alone = [0.4, 0.9, 0.6, 0.5]
        chosen = [k for k, weight in enumerate(weights) if weight]
        if len(chosen) == 1:
            return alone[chosen[0]]
        return 0.95 - (0.3 if 0 in chosen else 0.0)

    found = soup(4, score)
    assert found.weights == pytest.approx((0, 1 / 3, 1 / 3, 1 / 3))
    assert found.value == 0.95
    assert len(asked) == len(set(asked)) == 2 * 4 - 1
    assert [each.weights for each in found.history] == asked


def test_a_soup_of_one() -> None:
    assert soup(1, lambda weights: 0.5).weights == (1.0,)
    assert soup(3, lambda weights: -sum(w * w for w in weights[:1]) - len([w for w in weights if w])).weights[0] == 0


def test_lorahub_comes_near_the_best_weights_with_a_small_penalty() -> None:
    best = np.array([1.2, -0.4, 0.0, 0.7])

    def loss(weights: Sequence[float]) -> float:
        return float(np.square(np.array(weights) - best).sum())

    found = lorahub(4, loss, steps=300, penalty=0.0)
    assert found.value < 0.01
    assert len(found.history) <= 300
    assert max(map(abs, found.weights)) <= 1.5
    assert lorahub(4, loss, steps=300, penalty=0.0) == found  # seeded
    for seed in range(5):
        assert lorahub(4, loss, seed=seed).value < 0.5 * loss([0.0] * 4)  # the paper's 40 steps


def test_lorahub_stays_in_bounds_and_at_the_base_model_when_nothing_helps() -> None:
    assert lorahub(3, lambda weights: float(np.abs(weights).sum())).weights == (0.0, 0.0, 0.0)
    found = lorahub(3, lambda weights: -sum(weights), steps=200, bound=1.0)
    assert max(found.weights) <= 1.0
    assert sum(found.weights) > 2.5


def test_a_penalty_keeps_weights_small() -> None:
    free = lorahub(5, lambda weights: (sum(weights) - 1) ** 2, steps=200, penalty=0.0)
    bound = lorahub(5, lambda weights: (sum(weights) - 1) ** 2, steps=200, penalty=0.5)
    assert np.abs(bound.weights).sum() < np.abs(free.weights).sum()


def test_a_score_that_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="gave NaN"):
        soup(2, lambda weights: float("nan"))
