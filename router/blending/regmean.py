"""RegMean: the linear map that is nearest to every member's on that member's own inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from router.blending.operator import BlendSettings, Operator, Share, Statistic
from router.lowrank import Factors
from router.taxonomy import Reference

RIDGE = 1e-6  # of the mean diagonal: directions in which no member had any input stay at zero


class RegMean(Operator):
    """W = (sum_i w_i W_i G_i) (sum_i w_i G_i)^-1: the least squares solution.

    G_i = X_i^T X_i (d_in, d_in) is the Gram matrix of member i's inputs, its off-diagonal elements multiplied by
    `shrink`. W_0 cancels: the same holds for the dW_i.

    In low rank: sum_i w_i dW_i G_i G^-1 = [B_i] [w_i A_i G_i G^-1], so that the ranks add up and nothing is cut.
    """

    class Settings(BlendSettings):
        """shrink  what off-diagonal elements of the Gram matrices are multiplied with"""

        shrink: float = Field(default=0.9, ge=0, le=1)

    formula = "(sum w dW G) (sum w G)⁻¹"
    reference = Reference(title="RegMean (Jin et al. 2023)", url="https://arxiv.org/abs/2212.09849")
    exact = True
    relative = True
    statistic: ClassVar[Statistic | None] = "gram"

    def merge(self, module: str, shares: Sequence[Share]) -> Factors | Tensor:
        grams = [self.gram(share) * abs(share.weight) for share in shares]
        G = sum(grams[1:], grams[0])
        G = G + RIDGE * (float(G.diagonal().mean()) or 1.0) * torch.eye(len(G), dtype=G.dtype)
        rows = torch.cat([share.factors.A.double() @ gram for share, gram in zip(shares, grams, strict=True)])
        A = torch.linalg.solve(G, rows.mT).mT  # G is symmetric: rows G^-1
        B = torch.cat([share.factors.B * (1 if share.weight > 0 else -1) for share in shares], 1)
        return Factors(B=B, A=A.float())

    def gram(self, share: Share) -> Tensor:
        assert share.statistic is not None
        G = share.statistic.double()
        shrink: float = self.settings.shrink
        return shrink * G + (1 - shrink) * torch.diag(G.diagonal())
