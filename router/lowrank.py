"""Algebra on dW = B A that never forms dW.

Notation. `B (d_out, r)`, `A (r, d_in)`, with r far below both; an adapter's scale s is folded into B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CONDITION = 1e-3  # a Cholesky factor whose diagonal varies more than this has lost too many digits
NEGLIGIBLE = 1e-7  # directions this much weaker than the strongest are below float32's precision


class Factors(NamedTuple):
    """dW = B A."""

    B: Tensor  # (d_out, r)
    A: Tensor  # (r, d_in)


class SVD(NamedTuple):
    """dW = U diag(S) Vt with S descending. Has as many rows as B A might have; of a lower rank, the rest are zero."""

    U: Tensor  # (d_out, r), where r stands for min(r, d_out, d_in)
    S: Tensor  # (r,)
    Vt: Tensor  # (r, d_in)


def stack(parts: Sequence[Factors]) -> Factors:
    """Factors of the sum: [B_1, B_2, ...] [A_1; A_2; ...]."""
    return Factors(B=torch.cat([part.B for part in parts], 1), A=torch.cat([part.A for part in parts], 0))


def svd(factors: Factors) -> SVD:
    """Exact SVD of B A from factors of any float type; computed in float64, given back in float32.

    With B = Q R_B and A^T = P R_A, B A = Q (R_B R_A^T) P^T: the SVD of the small (r, r) core, M = u S v^T, is all that
    is needed. Q u = B R_A^T v / S and P v = (u^T R_B A)^T / S, so Q and P need not be formed either.
    """
    B, A = factors.B.double(), factors.A.double()
    R_B, R_A = triangle(B), triangle(A.mT)
    u, S, vt = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)  # (r, r)
    inverse = torch.where(S[0] * NEGLIGIBLE < S, 1 / S, 0.0)
    Vt = (((u.mT * inverse[:, None]) @ R_B) @ A).float()  # (r, d_in)
    signs = Vt.gather(1, Vt.abs().argmax(1, keepdim=True)).sign()  # arbitrary: make the largest entry positive
    U = B @ (R_A.mT @ (vt.mT * inverse * signs.mT))  # (d_out, r)
    return SVD(U.float(), (S * (inverse > 0)).float(), Vt * signs)


def singular_values(factors: Factors) -> Tensor:
    """(r,) of B A, descending, in float64."""
    values: Tensor = torch.linalg.svdvals(triangle(factors.B.double()) @ triangle(factors.A.mT.double()).mT)
    return values


def triangle(X: Tensor) -> Tensor:
    """(d, r) -> R (r, r) with R^T R = X^T X, the R of X = Q R up to signs; (d, r) when d < r.

    Cholesky of the Gram matrix is many times quicker than Householder's QR of a tall matrix, but squares the condition
    number: it is used where that leaves 10 digits.
    """
    cholesky: Tensor
    cholesky, failed = torch.linalg.cholesky_ex(X.mT @ X, upper=True)
    diagonal = cholesky.diagonal()
    if not failed and diagonal.min() > CONDITION * diagonal.max():
        return cholesky
    householder: Tensor = torch.linalg.qr(X, mode="r").R
    return householder


def inner_products(parts: Sequence[Factors | None]) -> Tensor:
    """(n, n) Frobenius inner products <dW_i, dW_j> = sum of (B_i^T B_j) * (A_i A_j^T), elementwise; None is zero."""
    there = [part for part in parts if part is not None]
    if not there:
        return torch.zeros(len(parts), len(parts), dtype=torch.float64)
    stacked = stack(there)
    products = (stacked.B.mT @ stacked.B) * (stacked.A @ stacked.A.mT)  # (sum of ranks, sum of ranks)
    owner = [i for i, part in enumerate(parts) if part is not None for _ in range(part.A.shape[0])]
    member = torch.nn.functional.one_hot(torch.tensor(owner), len(parts)).to(products.dtype)
    return member.mT @ products @ member
