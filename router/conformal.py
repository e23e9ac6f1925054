"""Conformal candidate sets: the fewest experts among which the right one is with probability 1 - alpha.

Split conformal prediction (Vovk et al. 2005; Angelopoulos and Bates, 2107.07511). With e_1 ... e_m the scores of
nonconformity that held-out prompts gave to their own experts, and q their ceil((m + 1)(1 - alpha))-th smallest, the
set of all experts with nonconformity at most q holds the right one with probability at least 1 - alpha, whatever the
router, as long as the new prompt and the held-out ones are exchangeable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Form = Literal["lac", "aps", "raps"]

#: RAPS (2009.14193): what each expert after the first few adds to the nonconformity, and how many go free.
PENALTY, FREE = 0.01, 3


def nonconformity(probabilities: Floats, form: Form = "lac") -> Floats:
    """(..., n) probabilities of experts -> (..., n) how badly each would fit the prompt.

    lac   1 - p_k (Sadinle et al. 2019): the smallest sets on average
    aps   the probability of all that are at least as probable (Romano et al. 2020), not randomised: sets that are
          large where the router is unsure
    raps  aps, plus a penalty on late ranks, which cuts long tails
    """
    if form == "lac":
        return 1 - probabilities
    order = np.argsort(-probabilities, axis=-1, kind="stable")
    total = np.cumsum(np.take_along_axis(probabilities, order, -1), axis=-1)
    if form == "raps":
        total = total + PENALTY * np.maximum(np.arange(1, probabilities.shape[-1] + 1) - FREE, 0)
    result = np.empty_like(total)
    np.put_along_axis(result, order, total, -1)
    return result


def quantile(held_out: Sequence[float] | Floats, alpha: float) -> float:
    """The largest nonconformity in a set: the ceil((m + 1)(1 - alpha))-th smallest of m, infinite if there is none."""
    scores = np.sort(np.asarray(held_out, float))
    rank = math.ceil((len(scores) + 1) * (1 - alpha) - 1e-9)
    return float(scores[rank - 1]) if rank <= len(scores) else math.inf


def conformal_size(probabilities: Floats, limit: float, form: Form = "lac") -> int:
    """How many of the experts, the most probable first, are in the set (n,); never none, which only adds coverage."""
    inside = nonconformity(probabilities, form) <= limit + 1e-12
    return max(1, int(inside.sum()))


def softmax(scores: Floats, temperature: float) -> Floats:
    """(..., n) scores, -inf for experts that are not considered -> probabilities."""
    top = scores.max(axis=-1, keepdims=True)
    weights: Floats = np.exp((scores - np.where(np.isfinite(top), top, 0)) / temperature)
    probabilities: Floats = weights / np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
    return probabilities
