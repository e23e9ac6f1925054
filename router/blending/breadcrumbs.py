"""Model breadcrumbs: neither the smallest elements nor the outliers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from router.blending.elementwise import rank_from_top, total
from router.blending.operator import BlendSettings, Density, Operator, Share
from router.lowrank import Factors
from router.taxonomy import Reference


class Breadcrumbs(Operator):
    """lambda sum_i w_i m_i * dW_i; m_i leaves out the `outliers` largest elements and as many of the smallest as it
    takes to keep `density`. When both do not fit, fewer outliers are left out (as in mergekit).
    """

    class Settings(BlendSettings):
        """density   the share of elements that is kept
        outliers  gamma, the share of the largest elements that is left out
        scale     lambda, multiplies the result
        """

        density: Density = 0.9
        outliers: float = Field(default=0.01, ge=0, lt=1)
        scale: float = 1.0

    formula = "λ sum w (dW without its largest and smallest elements)"
    reference = Reference(
        title="Model breadcrumbs (Davari and Belilovsky 2023)", url="https://arxiv.org/abs/2312.06795"
    )

    def merge(self, module: str, shares: Sequence[Share]) -> Factors | Tensor:
        masked = [self.mask(share.dense()) for share in shares]
        return total(masked, [self.settings.scale * share.weight for share in shares])

    def mask(self, delta: Tensor) -> Tensor:
        size = delta.numel()
        kept = int(self.settings.density * size)
        cut = min(int(self.settings.outliers * size), size - kept)  # this many of the largest
        if kept == 0:
            return torch.zeros_like(delta)
        magnitude = delta.abs()
        keep = magnitude >= rank_from_top(magnitude, cut + kept)
        if cut:
            keep &= magnitude < rank_from_top(magnitude, cut)
        return delta * keep
