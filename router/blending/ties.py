"""TIES-Merging: trim, elect signs, merge what agrees."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from router.blending.elementwise import Electing, Pruned, elect, keep_largest
from router.blending.operator import Operator, Share
from router.lowrank import Factors
from router.taxonomy import Reference


class Ties(Operator):
    """Keep each dW_i's largest elements, elect a sign for every element, average the members that have it."""

    class Settings(Pruned, Electing):
        pass

    formula = "mean of largest elements that agree with the elected sign"
    reference = Reference(title="TIES (Yadav et al. 2023)", url="https://arxiv.org/abs/2306.01708")
    relative = True

    def merge(self, module: str, shares: Sequence[Share]) -> Factors | Tensor:
        trimmed = [keep_largest(share.dense(), self.settings.density) for share in shares]
        return elect(trimmed, [share.weight for share in shares], self.settings.mean)
