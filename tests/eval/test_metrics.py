from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import roc_auc_score, roc_curve

from eval.metrics import auroc, false_positives, reciprocal_rank, top

RANKS = np.array([1, 0, 3, 2, 1])
SCORES = st.integers(1, 30).flatmap(lambda n: arrays(np.float64, n, elements=st.integers(-5, 5).map(float)))


def test_ranks_count_from_one_and_zero_is_not_ranked() -> None:
    assert [top(RANKS, k) for k in (1, 2, 3)] == pytest.approx([2 / 5, 3 / 5, 4 / 5])
    assert reciprocal_rank(RANKS) == pytest.approx((1 + 0 + 1 / 3 + 1 / 2 + 1) / 5)


@settings(deadline=None)
@given(SCORES, SCORES)
def test_auroc_counts_pairs(inside: np.ndarray, outside: np.ndarray) -> None:
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in inside for b in outside]
    assert auroc(inside, outside) == pytest.approx(np.mean(pairs))


@settings(deadline=None)
@given(SCORES, SCORES)
def test_false_positives_are_those_of_the_highest_threshold_with_enough_recall(
    inside: np.ndarray, outside: np.ndarray
) -> None:
    threshold = max(t for t in inside if (inside >= t).mean() >= 0.95)
    assert false_positives(inside, outside) == pytest.approx((outside >= threshold).mean())


@settings(deadline=None)
@given(SCORES, SCORES)
def test_both_agree_with_scikit_learn(inside: np.ndarray, outside: np.ndarray) -> None:
    labels = np.arange(len(inside) + len(outside)) < len(inside)
    scores = np.concatenate([inside, outside])
    assert auroc(inside, outside) == pytest.approx(roc_auc_score(labels, scores))
    wrongly, rightly, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert false_positives(inside, outside) == pytest.approx(wrongly[np.argmax(rightly >= 0.95 - 1e-9)])


def test_a_perfect_score_lets_nothing_through() -> None:
    assert auroc(np.array([2.0, 3.0]), np.array([1.0])) == 1
    assert false_positives(np.array([2.0, 3.0]), np.array([1.0])) == 0
