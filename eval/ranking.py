"""Systems compared over many tasks: what a mean over different metrics cannot say.

Scores are matrices (T, S), a row to a task and a column to a system, higher is better; equal scores are ties.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp  # type: ignore[import-untyped]
from scipy.sparse import coo_array  # type: ignore[import-untyped]
from scipy.stats import rankdata  # type: ignore[import-untyped]

Floats = NDArray[np.float64]


def normalised(scores: Floats, oracle: Floats) -> Floats:
    """(S,) mean over tasks of score / oracle (T,); tasks where the oracle has nothing say nothing."""
    tells = oracle > 0
    share: Floats = (scores[tells] / oracle[tells, None]).mean(axis=0)
    return share


def regret(scores: Floats) -> Floats:
    """(S,) what each system loses on average to the best of them on each row (a prompt, then, rather than a task)."""
    lost: Floats = (scores.max(axis=1, keepdims=True) - scores).mean(axis=0)
    return lost


def borda(scores: Floats) -> Floats:
    """(S,) mean over tasks of the share of the other systems that a system beats; a tie beats half."""
    beaten = rankdata(scores, axis=1) - 1  # (T, S)
    points: Floats = beaten.mean(axis=0) / max(scores.shape[1] - 1, 1)
    return points


def kemeny(scores: Floats) -> list[int]:
    """The ranking, best first, with the fewest disagreements: pairs that some task orders the other way.

    An integer program (Conitzer et al. 2006): x_ab is 1 if a stands above b, and x_ab + x_bc - x_ac is 0 or 1 for
    all a < b < c, so that there are no circles. Of several such rankings it is one next to Borda's order.
    """
    S = scores.shape[1]
    order = np.argsort(-borda(scores), kind="stable")
    if S < 2:
        return [int(k) for k in order]
    above = (scores[:, order, None] > scores[:, None, order]).sum(axis=0)  # (S, S) tasks where a beats b
    a, b = np.triu_indices(S, 1)  # (P,) pairs
    pair = np.zeros((S, S), int)
    pair[a, b] = np.arange(len(a))
    cost = (above[b, a] - above[a, b]) * (len(a) + 1) - 1  # of a above b; by the -1, ties keep the order

    circles = np.array(list(combinations(range(S), 3)), int).reshape(-1, 3).T  # (3, C)
    columns = np.stack([pair[circles[0], circles[1]], pair[circles[1], circles[2]], pair[circles[0], circles[2]]])
    rows = np.broadcast_to(np.arange(columns.shape[1]), columns.shape)
    signs = np.broadcast_to([[1], [1], [-1]], columns.shape)
    matrix = coo_array((signs.ravel(), (rows.ravel(), columns.ravel())), shape=(columns.shape[1], len(a)))
    solved = milp(
        cost,
        integrality=np.ones(len(a)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(matrix, 0, 1) if columns.size else (),
        options={"mip_rel_gap": 0},
    )
    assert solved.success, solved.message
    won = solved.x.round().astype(int)
    below = np.bincount(a, won, S) + np.bincount(b, 1 - won, S)  # (S,) how many each stands above
    return [int(k) for k in order[np.argsort(-below, kind="stable")]]
