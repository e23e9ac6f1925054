"""Fusion of the factors themselves: cheap, of the members' own rank, and with cross terms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from router.blending.operator import Operator, Share
from router.lowrank import Factors
from router.taxonomy import Reference


class Linear(Operator):
    """B = sum_i sqrt|w_i s_i| B_i, A = sum_i sign(w_i s_i) sqrt|w_i s_i| A_i, as PEFT's `linear`.

    B A also has the products of one member's B with another's A, so that the result depends on how each dW_i happens to
    be factored: B_i Q, Q^T A_i with a rotation Q is the same adapter and gives another blend. A smaller member is
    padded with zero rows.
    """

    formula = "(sum √(w s) B) (sum √(w s) A)"
    reference = Reference(title="LoraRetriever's fusion (Zhao et al. 2024)", url="https://arxiv.org/abs/2402.09997")
    exact = True

    def merge(self, module: str, shares: Sequence[Share]) -> Factors | Tensor:
        r = max(share.rank for share in shares)
        B, A = torch.zeros(shares[0].B.shape[0], r), torch.zeros(r, shares[0].A.shape[1])
        for share in shares:
            strength = share.weight * share.scale
            root = math.sqrt(abs(strength))
            B[:, : share.rank] += root * share.B.float()
            A[: share.rank] += math.copysign(root, strength) * share.A.float()
        return Factors(B=B, A=A)

    def rows(self, module: str, ranks: Mapping[str, int]) -> int:
        return max(ranks.values())
