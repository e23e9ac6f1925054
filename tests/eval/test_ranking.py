from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from eval.ranking import borda, kemeny, places

SCORES = st.tuples(st.integers(1, 6), st.integers(1, 5)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=st.integers(0, 4).map(float))
)


def disagreements(scores: np.ndarray, ranking: tuple[int, ...] | list[int]) -> int:
    pairs = [(a, b) for n, a in enumerate(ranking) for b in ranking[n + 1 :]]
    return sum(task[b] > task[a] for task in scores for a, b in pairs)


@settings(deadline=None)
@given(SCORES)
def test_kemeny_is_the_best_of_all_rankings(scores: np.ndarray) -> None:
    ranking, exact = kemeny(scores)
    assert exact
    assert sorted(ranking) == list(range(scores.shape[1]))
    fewest = min(disagreements(scores, each) for each in permutations(range(scores.shape[1])))
    assert disagreements(scores, ranking) == fewest


def test_a_system_that_wins_every_duel_is_first_though_its_mean_is_worse() -> None:
    scores = np.array([[0.5, 0.4], [0.5, 0.4], [0.1, 100.0]])
    assert kemeny(scores) == ([0, 1], True)
    assert scores.mean(axis=0).argmax() == 1
    assert borda(scores) == pytest.approx([2 / 3, 1 / 3])


def test_ties_keep_their_order_and_beat_half() -> None:
    assert kemeny(np.ones((3, 4))) == ([0, 1, 2, 3], True)
    assert borda(np.ones((3, 4))) == pytest.approx([0.5] * 4)
    assert borda(np.ones((3, 1))) == pytest.approx([0])


@settings(deadline=None)
@given(SCORES)
def test_borda_counts_duels(scores: np.ndarray) -> None:
    systems = range(scores.shape[1])
    others = max(len(systems) - 1, 1)
    won = [
        np.mean([sum((t[a] > t[b]) + (t[a] == t[b]) / 2 for b in systems if b != a) / others for t in scores])
        for a in systems
    ]
    assert borda(scores) == pytest.approx(won)


def test_thirty_systems_are_ranked_as_the_one_task_ranks_them() -> None:
    scores = np.random.default_rng(0).random((1, 30))
    assert kemeny(scores) == (np.argsort(-scores[0]).tolist(), True)


def test_a_circle_is_broken_where_it_costs_least() -> None:
    abc, bca, cab = [3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [2.0, 1.0, 3.0]
    assert kemeny(np.array([abc, abc, bca, cab]))[0] == [0, 1, 2]  # a > b 3:1, b > c 3:1, c > a 2:2
    assert kemeny(np.array([abc, bca, bca, cab]))[0] == [1, 2, 0]


def test_too_many_for_the_best_ranking_are_ranked_nearly_so(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = np.random.default_rng(2).random((48, 24))
    best, exact = kemeny(scores)
    assert exact
    monkeypatch.setattr("eval.ranking.EXACT", 23)
    near, exact = kemeny(scores)
    assert not exact, "this one takes an integer program"
    assert sorted(near) == list(range(24))
    by_borda = np.argsort(-borda(scores)).tolist()
    fewest = disagreements(scores, best)
    assert fewest <= disagreements(scores, near) <= min(disagreements(scores, by_borda), 1.01 * fewest)


def test_neighbours_that_no_majority_sets_apart_share_a_place() -> None:
    assert places(np.ones((3, 4)), [0, 1, 2, 3]) == [1, 1, 1, 1]
    assert places(np.array([[3.0, 1.0, 2.0]]), [0, 2, 1]) == [1, 3, 2]
    scores = np.array([[3.0, 2.0, 1.0, 1.0], [2.0, 3.0, 1.0, 1.0]])
    assert places(scores, kemeny(scores)[0]) == [1, 1, 3, 3]
    # a = b and b = c by as many tasks, but a stands above c: c is no neighbour of equals
    scores = np.array([[3.0, 2.0, 1.0], [2.0, 3.0, 1.0], [3.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
    assert places(scores, [0, 1, 2]) == [1, 1, 3]
