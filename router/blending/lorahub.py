"""LoraHub: a gradient-free search of weights on a few labelled examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from router.blending.search import Found, Search, Tried, distinct
from router.taxonomy import Reference

LORAHUB = Search(
    formula="weights: a gradient-free search for the smallest loss",
    reference=Reference(title="LoraHub (Huang et al. 2023)", url="https://arxiv.org/abs/2307.13269"),
    seeded=True,
)

Loss = Callable[[Sequence[float]], float]


def lorahub(
    members: int, loss: Loss, *, steps: int = 40, bound: float = 1.5, penalty: float = 0.05, seed: int = 0
) -> Found:
    """Weights (members,) in [-bound, bound] with a small loss(w) + penalty mean|w|, after `steps` evaluations.

    `loss` is the blend's cross-entropy on a labelled set that the caller has. The search is a (1+1) evolution strategy
    with the one-fifth success rule (Rechenberg 1973) from w = 0, the base model: nevergrad's choice for budgets as
    small as the paper's.
    """
    assert members > 0
    assert steps > 0
    ask, history = distinct(loss)

    def objective(weights: np.ndarray) -> float:
        return ask(weights.tolist()) + penalty * float(np.abs(weights).mean())

    random = np.random.default_rng(seed)
    best, sigma = np.zeros(members), bound / 3
    value = objective(best)
    for _ in range(steps - 1):
        tried = np.clip(best + sigma * random.standard_normal(members), -bound, bound)
        its = objective(tried)
        better = its < value
        if its <= value:
            best, value = tried, its
        sigma = min(sigma * (1.5 if better else 1.5**-0.25), bound)  # in balance at one success in five
    return Found(tuple(best.tolist()), ask(best.tolist()), tuple(Tried(*each) for each in history.items()))
