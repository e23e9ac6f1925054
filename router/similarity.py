"""How alike two adapters are: is a proposed expert one that is there already?

Of the updates dW = B A alone, scale included, over all modules; dW is never formed. Weights say whether an adapter is
a copy, scaled or not, trained a little further or not. They do not say whether two adapters do the same: training
twice on one task from two seeds gives updates that are nearly at right angles.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from router.adapter import Adapter
from router.lowrank import NEGLIGIBLE, Factors, triangle


@dataclass(frozen=True)
class Likeness:
    """Of an adapter to another, called `name`.

    cosine   of their updates, [-1, 1]: 1 for the same one, however it is scaled or factored; -1 for its opposite
    overlap  of their updates' column spaces, [0, 1]: 1 when they write the same directions, however strongly
    """

    name: str
    cosine: float
    overlap: float

    def json(self) -> dict[str, Any]:
        return asdict(self)


def most_similar(newcomer: Adapter, others: Iterable[tuple[str, Adapter]], k: int = 5) -> list[Likeness]:
    """The k others whose updates are most along the newcomer's, or most against: by |cosine|, ties by name.

    One module of two adapters is in memory at a time, if `others` opens them as they are asked for.
    """
    mine = length(newcomer)
    cosines = ((_cosine(newcomer, mine, other), name, other) for name, other in others)
    best = heapq.nsmallest(k, cosines, key=lambda each: (-abs(each[0]), each[1]))
    return [Likeness(name, found, overlap(newcomer, other)) for found, name, other in best]


def cosine(one: Adapter, other: Adapter) -> float:
    """<dW_1, dW_2> / (|dW_1| |dW_2|) over all modules; 0 when one of them changes nothing."""
    return _cosine(one, length(one), other)


def length(adapter: Adapter) -> float:
    """|dW|, the Frobenius norm over all modules."""
    squares = [inner_product(*[_factors(adapter, module)] * 2) for module in adapter.modules]
    return float(max(sum(squares), 0.0) ** 0.5)


def inner_product(one: Factors, other: Factors) -> float:
    """<dW_1, dW_2> = tr(A_1^T B_1^T B_2 A_2) = sum of (B_1^T B_2) * (A_1 A_2^T), elementwise."""
    return float(((one.B.mT @ other.B) * (one.A @ other.A.mT)).sum())  # (r_1, r_2)


def overlap(one: Adapter, other: Adapter) -> float:
    """Mean over the shared modules of |Q_1^T Q_2|_F^2 / min(r_1, r_2); 0 when they share none.

    The columns of Q_i (d_out, r_i) are an orthonormal basis of dW_i's column space, so this is the mean squared cosine
    of the principal angles between the two (Hu et al. 2021, LoRA, section 7.2). Two random spaces have about
    max(r_1, r_2) / d_out.
    """
    found = []
    for module in _shared(one, other):
        Q1, Q2 = columns(_factors(one, module)), columns(_factors(other, module))
        if least := min(Q1.shape[1], Q2.shape[1]):
            found.append(float((Q1.mT @ Q2).square().sum()) / least)
    return min(sum(found) / len(found), 1.0) if found else 0.0


def columns(factors: Factors) -> Tensor:
    """(d_out, r') orthonormal basis of the column space of B A; r' is its true rank, which may be under r."""
    R = triangle(factors.A.mT)  # A^T = P R, so that B A = B R^T P^T, and P^T changes no column space
    Q, core = torch.linalg.qr(factors.B @ R.mT)  # (d_out, r), (r, r)
    U, S, _ = torch.linalg.svd(core)
    basis: Tensor = Q @ U[:, S[0] * NEGLIGIBLE < S]
    return basis


def _shared(one: Adapter, other: Adapter) -> list[str]:
    """The modules that both adapt, and with the same shape."""
    return [m for m in one.modules if other.rank(m) and one.rank(m) and one.shape(m) == other.shape(m)]


def _factors(adapter: Adapter, module: str) -> Factors:
    factors = adapter.factors(module)
    assert factors is not None
    return factors


def _cosine(one: Adapter, length_of_one: float, other: Adapter) -> float:
    """In one pass over the other's file. A module that only one of them adapts adds nothing to the product; nor does
    one whose shapes differ.
    """
    product = square = 0.0
    shared = set(_shared(one, other))
    for module in other.modules:
        theirs = _factors(other, module)
        square += inner_product(theirs, theirs)
        if module in shared:
            product += inner_product(_factors(one, module), theirs)
    lengths = length_of_one * max(square, 0.0) ** 0.5
    return min(max(product / lengths, -1.0), 1.0) if lengths > 0 else 0.0
