"""Systems compared over many tasks: what a mean over different metrics cannot say.

Scores are matrices (T, S), a row to a task and a column to a system, higher is better; equal scores are ties.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp  # type: ignore[import-untyped]
from scipy.sparse import coo_array  # type: ignore[import-untyped]
from scipy.stats import rankdata  # type: ignore[import-untyped]

Floats = NDArray[np.float64]

EXACT = 50  # systems, up to which the best ranking is found whatever it takes: a second or two at worst
TOLERANCE = 1e-5  # more than the solver's own


def borda(scores: Floats) -> Floats:
    """(S,) mean over tasks of the share of the other systems that a system beats; a tie beats half."""
    beaten = rankdata(scores, axis=1) - 1  # (T, S)
    points: Floats = beaten.mean(axis=0) / max(scores.shape[1] - 1, 1)
    return points


def kemeny(scores: Floats) -> tuple[list[int], bool]:
    """The ranking, best first, with the fewest disagreements: pairs that some task orders the other way.

    An integer program (Conitzer et al. 2006): x_ab is 1 if a stands above b, and x_ab + x_bc - x_ac is 0 or 1 for
    all a < b < c, so that there are no circles; only the circles that a solution has are ruled out, until it has none.
    Where every x of the relaxation is 0 or 1 anyway, which is usual, it is the ranking. Where not, and there are more
    than `EXACT` systems, they stand in the order of their sums of x, and the second result is False: it is near the
    best ranking, but nobody has shown that it is one. Of several rankings it is one next to Borda's order.
    """
    S = scores.shape[1]
    order = np.argsort(-borda(scores), kind="stable")
    if S < 2:
        return [int(k) for k in order], True
    above = (scores[:, order, None] > scores[:, None, order]).sum(axis=0)  # (S, S) tasks where a beats b
    a, b = np.triu_indices(S, 1)  # (P,) pairs
    cost = (above[b, a] - above[a, b]) * (len(a) + 1) - 1  # of a above b; by the -1, ties keep the order
    x = _without_circles(cost, S, integral=False)
    exact = bool((np.abs(x - x.round()) < TOLERANCE).all())
    if not exact and S <= EXACT:
        x, exact = _without_circles(cost, S, integral=True), True
    if exact:
        x = x.round()
    below = np.bincount(a, x, S) + np.bincount(b, 1 - x, S)  # (S,) how many each stands above
    return [int(k) for k in order[np.argsort(-below.round(6), kind="stable")]], exact


def places(scores: Floats, order: Sequence[int]) -> list[int]:
    """(S,) places from 1 in a ranking, best first; neighbours share one if as many tasks prefer either of any two."""
    above = (scores[:, :, None] > scores[:, None, :]).sum(axis=0)
    found = [0] * len(order)
    together: list[int] = []
    for place, system in enumerate(order, start=1):
        tied = all(above[system, other] == above[other, system] for other in together)
        together = [*together, system] if together and tied else [system]
        found[system] = place - len(together) + 1
    return found


def _without_circles(cost: NDArray[np.int64], S: int, *, integral: bool) -> Floats:
    """(P,) the cheapest x from 0 to 1 (0 or 1 if `integral`) that breaks no rule."""
    a, b, c = np.array(list(combinations(range(S), 3)), int).reshape(-1, 3).T  # (C,)
    pair = np.zeros((S, S), int)
    pair[np.triu_indices(S, 1)] = np.arange(len(cost))
    rules = np.stack([pair[a, b], pair[b, c], pair[a, c]])  # (3, C)
    held = np.zeros(rules.shape[1], bool)
    x: Floats = (cost < 0).astype(np.float64)
    while True:
        told = x[rules[0]] + x[rules[1]] - x[rules[2]]
        broken = ((told < -TOLERANCE) | (told > 1 + TOLERANCE)) & ~held
        if not broken.any():
            return x
        held |= broken
        columns = rules[:, held]
        rows = np.broadcast_to(np.arange(columns.shape[1]), columns.shape)
        signs = np.broadcast_to([[1], [1], [-1]], columns.shape)
        matrix = coo_array((signs.ravel(), (rows.ravel(), columns.ravel())), shape=(columns.shape[1], len(cost)))
        solved = milp(
            cost,
            integrality=np.full(len(cost), int(integral)),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(matrix, 0, 1),
            options={"mip_rel_gap": 0},
        )
        assert solved.success, solved.message
        x = solved.x.round() if integral else solved.x
