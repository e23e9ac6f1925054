"""Consensus merging: what TALL masks say that more than one task uses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from router.blending.elementwise import total
from router.blending.operator import BlendSettings, Operator, Share
from router.lowrank import Factors
from router.taxonomy import Reference


class Consensus(Operator):
    """A member's TALL mask says where it explains the multi-task vector: |dW_i| > lambda |sum_j dW_j - dW_i|. Elements
    that fewer than `least` members use (catastrophic ones: none; selfish ones: one) are left out of sum_i w_i dW_i.
    """

    class Settings(BlendSettings):
        """threshold  lambda: the larger, the fewer elements a member is taken to use
        least      how many members must use an element; at most as many as adapt the module
        """

        threshold: float = Field(default=0.4, ge=0)
        least: int = Field(default=2, ge=1)

    formula = "sum w dW where at least k TALL masks agree"
    reference = Reference(title="TALL masks (Wang et al. 2024)", url="https://arxiv.org/abs/2405.07813")

    def merge(self, module: str, shares: Sequence[Share]) -> Factors | Tensor:
        deltas = [share.dense() for share in shares]
        together = total(deltas, [1.0] * len(deltas))
        users = torch.zeros_like(together)
        for delta in deltas:
            users.add_(delta.abs() > self.settings.threshold * (together - delta).abs_())
        merged = total(deltas, [share.weight for share in shares])
        least: int = min(self.settings.least, len(deltas))
        return merged * (users >= least)
