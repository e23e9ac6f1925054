"""The weighted sum, exactly: stacked factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from router.blending.operator import Operator, Share
from router.lowrank import Factors


def concatenate(shares: Sequence[Share], weights: Sequence[float]) -> Factors:
    """sum_i w_i dW_i = [B_1 B_2 ...] [w_1 s_1 A_1; w_2 s_2 A_2; ...]; float32."""
    B = torch.cat([share.B.float() for share in shares], 1)  # (d_out, sum r_i)
    A = torch.empty(B.shape[1], shares[0].A.shape[1])
    start = 0
    for share, weight in zip(shares, weights, strict=True):
        torch.mul(share.A.float(), weight * share.scale, out=A[start : start + share.rank])
        start += share.rank
    return Factors(B=B, A=A)


class Cat(Operator):
    """sum_i w_i dW_i. The rank adds up; no cross terms, no approximation: the default."""

    formula = "sum w dW"
    exact = True

    def merge(self, module: str, shares: Sequence[Share]) -> Factors | Tensor:
        return concatenate(shares, [share.weight for share in shares])
