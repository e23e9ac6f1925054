"""Fisher-weighted averaging: every parameter by how much the member's answers depend on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from router.blending.operator import BlendSettings, Operator, Share, Statistic
from router.lowrank import Factors
from router.taxonomy import Reference


class Fisher(Operator):
    """sum_i w_i F_i * dW_i / sum_i w_i F_i, F_i (d_out, d_in) the diagonal of member i's Fisher information of W.

    The pretrained W_0 cancels in the mean. Where no member has any information, the plain weighted mean.
    """

    class Settings(BlendSettings):
        pass

    formula = "sum w F * dW / sum w F"
    reference = Reference(title="Fisher merging (Matena and Raffel 2022)", url="https://arxiv.org/abs/2111.09832")
    relative = True
    statistic: ClassVar[Statistic | None] = "fisher"

    def merge(self, module: str, shares: Sequence[Share]) -> Factors | Tensor:
        shape = shares[0].B.shape[0], shares[0].A.shape[1]
        top, bottom, plain = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
        largest = max(float(information(share).max()) for share in shares) or 1.0
        for share in shares:
            weighted = information(share) * (abs(share.weight) / largest)
            delta = share.dense() * (1 if share.weight > 0 else -1)
            top.addcmul_(weighted, delta)
            bottom.add_(weighted)
            plain.add_(delta, alpha=abs(share.weight))
        plain /= sum(abs(share.weight) for share in shares)
        return torch.where(bottom > 0, top / bottom, plain)


def information(share: Share) -> Tensor:
    assert share.statistic is not None
    return share.statistic.float()
