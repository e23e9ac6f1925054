"""The best low rank of a merged update, from its factors or from the dense matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from router.lowrank import SVD, Factors, svd

#: Dense matrices up to this size have their exact SVD; larger ones the randomised one.
EXACT = 512
#: Extra directions and power iterations of the randomised SVD.
OVERSAMPLE, ITERATIONS = 16, 4


class Compressed(NamedTuple):
    """Factors of the wanted rank; `total` and `lost` are squared Frobenius norms, before and of what was cut off."""

    factors: Factors
    total: float
    lost: float


def compress(merged: Factors | Tensor, rank: int) -> Compressed:
    """Cut to `rank`, the singular values shared equally between both factors: B = U sqrt(S), A = sqrt(S) V^T."""
    if isinstance(merged, Tensor):
        spectrum = dense_svd(merged, rank)
        total = float(torch.linalg.vector_norm(merged, dim=1).double().square().sum())
    else:
        spectrum = svd(merged)
        total = float(spectrum.S.double().square().sum())
    U, S, Vt = spectrum.U[:, :rank], spectrum.S[:rank], spectrum.Vt[:rank]
    root = S.sqrt()
    kept = float(S.double().square().sum())
    return Compressed(Factors(B=U * root, A=root[:, None] * Vt), total, max(0.0, total - kept))


def dense_svd(M: Tensor, rank: int) -> SVD:
    """The first singular triplets of a dense matrix (d_out, d_in), at least `rank` as far as it has them; float32."""
    if min(M.shape) <= EXACT:
        U, S, Vt = torch.linalg.svd(M.double(), full_matrices=False)
        return SVD(U.float(), S.float(), Vt.float())
    return randomised_svd(M, rank)


def randomised_svd(M: Tensor, rank: int) -> SVD:
    """Halko, Martinsson and Tropp 2011, algorithm 4.4: a random subspace, turned to the strongest directions by
    multiplying with M and M^T in turns. The seed is fixed, so the same matrix gives the same result.
    """
    k = min(rank + OVERSAMPLE, *M.shape)
    start = torch.randn(M.shape[1], k, generator=torch.Generator().manual_seed(0), dtype=M.dtype)
    Q = _orthonormal(M @ start)  # (d_out, k)
    for _ in range(ITERATIONS):
        Q = _orthonormal(M @ _orthonormal(M.mT @ Q))
    return svd(Factors(B=Q, A=Q.mT @ M))  # M is nearly Q Q^T M


def _orthonormal(X: Tensor) -> Tensor:
    Q: Tensor = torch.linalg.qr(X).Q
    return Q
