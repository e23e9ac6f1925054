"""DARE: drop elements at random, rescale, add up."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from router.blending.elementwise import Dropped, drop_and_rescale, total
from router.blending.operator import Operator, Share
from router.lowrank import Factors
from router.taxonomy import Reference

DARE = Reference(title="DARE (Yu et al. 2024)", url="https://arxiv.org/abs/2311.03099")


class DareLinear(Operator):
    """sum_i w_i M_i * dW_i / p with random masks M_i that keep an element with probability p, the density."""

    Settings = Dropped

    formula = "sum w (mask * dW) / p"
    reference = DARE

    def merge(self, module: str, shares: Sequence[Share]) -> Factors | Tensor:
        dropped = [drop_and_rescale(share.dense(), self.settings.density, share.seed) for share in shares]
        return total(dropped, [share.weight for share in shares])
