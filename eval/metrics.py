"""Figures of merit for routing: ranks, and how well a score tells two kinds of prompts apart.

A bootstrap calls them thousands of times: they are scikit-learn's figures without its checks of arguments.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ranks = NDArray[np.int64]  # 1: the best; 0: not ranked


def top(ranks: Ranks, k: int) -> float:
    """Share of prompts (n,) whose own expert is among the best k."""
    return float(((ranks >= 1) & (ranks <= k)).mean())


def reciprocal_rank(ranks: Ranks) -> float:
    """Mean over prompts (n,) of 1 / rank of their own expert, 0 where it is not ranked."""
    return float(np.divide(1.0, ranks, out=np.zeros(len(ranks)), where=ranks > 0).mean())


def auroc(inside: Floats, outside: Floats) -> float:
    """P(inside > outside) + P(inside = outside) / 2, of one score (n,) against another (m,)."""
    ordered = np.sort(outside)
    lower, not_higher = (np.searchsorted(ordered, inside, side) for side in ("left", "right"))  # (n,) both
    return float((lower + not_higher).mean() / 2 / len(outside))


def false_positives(inside: Floats, outside: Floats, recall: float = 0.95) -> float:
    """Share of `outside` (m,) accepted by the highest threshold that accepts a share `recall` of `inside` (n,)."""
    accepted = int(np.ceil(recall * len(inside) - 1e-9))
    return float((outside >= np.sort(inside)[-accepted]).mean())
