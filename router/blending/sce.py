"""SCE: select, calculate, erase."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from router.blending.elementwise import rank_from_top
from router.blending.operator import BlendSettings, Operator, Share
from router.lowrank import Factors
from router.taxonomy import Reference


class SCE(Operator):
    """Select the elements in which the members differ most (variance), weigh each member by the energy of its selected
    elements, erase what is against the majority's sign, and take the weighted mean.

    A member's weight in the blend multiplies the one that is calculated; the paper has none.
    """

    class Settings(BlendSettings):
        """select  the share of elements, among those that differ at all, that is kept"""

        select: float = Field(default=1.0, gt=0, le=1)

    formula = "mean, by energy, of the elements of largest variance that have the majority's sign"
    reference = Reference(title="SCE, FuseChat (Wan et al. 2024)", url="https://arxiv.org/abs/2408.07990")
    relative = True

    def merge(self, module: str, shares: Sequence[Share]) -> Factors | Tensor:
        deltas = [share.dense() * (1 if share.weight > 0 else -1) for share in shares]
        if self.settings.select < 1 and len(deltas) > 1:
            keep = self.selected(deltas)
            deltas = [delta * keep for delta in deltas]
        energies = [float(delta.double().square().mean()) for delta in deltas]
        if not any(energies):
            return torch.zeros_like(deltas[0])
        coefficients = [abs(share.weight) * energy for share, energy in zip(shares, energies, strict=True)]
        return majority(deltas, coefficients)

    def selected(self, deltas: Sequence[Tensor]) -> Tensor:
        """(d_out, d_in) bool: the elements of largest variance over the members."""
        mean = sum(deltas[1:], deltas[0]) / len(deltas)
        variance = torch.zeros_like(mean)
        for delta in deltas:
            variance.add_((delta - mean).square_())
        count = int(self.settings.select * int(variance.count_nonzero()))
        if count == 0:
            return torch.zeros_like(mean, dtype=torch.bool)
        return variance >= rank_from_top(variance, count)


def majority(deltas: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """sum of c_i D_i / sum of c_i over those with the sign of sum_i D_i, elected without coefficients."""
    positive = sum(deltas[1:], deltas[0]) >= 0
    result, counted = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, coefficient in zip(deltas, coefficients, strict=True):
        agrees = ((delta > 0) == positive) & (delta != 0)
        result.addcmul_(delta, agrees.to(delta.dtype), value=coefficient)
        counted.add_(agrees, alpha=coefficient)
    return torch.where(counted > 0, result / counted, 0.0)
