"""Greedy model soup: add the members that help, best first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from router.blending.search import Found, Search, Tried, distinct
from router.taxonomy import Reference

SOUP = Search(
    formula="weights: the uniform mean of the members that help",
    reference=Reference(title="Model soups (Wortsman et al. 2022)", url="https://arxiv.org/abs/2203.05482"),
    seeded=False,
)

Score = Callable[[Sequence[float]], float]


def soup(members: int, score: Score) -> Found:
    """Weights (members,) of the greedy soup: a uniform mean of the ingredients, zero for the others.

    `score` tells how good a blend with given weights is on a labelled set that the caller has; higher is better, and it
    is asked 2 K - 1 times at most. Members stand in line by their own score (ties: the first one first); each joins if
    the soup does not get worse by it.
    """
    assert members > 0
    ask, history = distinct(score)
    order = sorted(range(members), key=lambda member: -ask(uniform([member], members)))
    ingredients = order[:1]
    best = ask(uniform(ingredients, members))
    for member in order[1:]:
        tried = ask(uniform([*ingredients, member], members))
        if tried >= best:
            ingredients, best = [*ingredients, member], tried
    return Found(tuple(uniform(ingredients, members)), best, tuple(Tried(*each) for each in history.items()))


def uniform(chosen: Sequence[int], members: int) -> list[float]:
    return [1 / len(chosen) if member in chosen else 0.0 for member in range(members)]
