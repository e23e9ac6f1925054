"""PCB-Merging: parameters compete, within a task and between tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from router.blending.elementwise import rank_from_top, total
from router.blending.operator import BlendSettings, Density, Operator, Share
from router.lowrank import Factors
from router.taxonomy import Reference

EXTREME = 1e-4  # of the elements at either end are taken for no smaller, no larger than the next


class PCB(Operator):
    """b_i = exp(n norm(|dW_i|)^2) tanh(dW_i * sum_j dW_j): how much an element matters within its task, and whether the
    tasks agree on it. The top `density` of b_i, scaled to [0, 1], is the coefficient c_i; then sum c_i dW_i / sum c_i.

    As in the authors' code (norm is min-max, the extremes clamped), but within a module instead of over the model.
    A member's weight multiplies c_i; the paper has none.
    """

    class Settings(BlendSettings):
        """density  the share of elements that keeps a coefficient above zero
        scale    lambda, multiplies the result
        """

        density: Density = 0.1
        scale: float = 1.0

    formula = "λ sum c dW / sum c, c from parameter competition"
    reference = Reference(title="PCB-Merging (Du et al. 2024)", url="https://arxiv.org/abs/2410.02396")
    relative = True

    def merge(self, module: str, shares: Sequence[Share]) -> Factors | Tensor:
        deltas = [share.dense() * (1 if share.weight > 0 else -1) for share in shares]
        together = total(deltas, [1.0] * len(deltas))
        result, counted = torch.zeros_like(together), torch.zeros_like(together)
        for share, delta in zip(shares, deltas, strict=True):
            magnitude = clamp(delta.abs(), EXTREME, EXTREME)
            within = unit(magnitude).square_().mul_(len(deltas)).exp_()
            balance = within * (delta * together).tanh_()
            coefficient = unit(clamp(balance, 1 - self.settings.density, 0)).mul_(abs(share.weight))
            result.add_(delta.sign().mul_(magnitude).mul_(coefficient))
            counted.add_(coefficient)
        return result.div_(counted.clamp_(min=1e-12)).mul_(self.settings.scale)


def clamp(X: Tensor, low: float, high: float) -> Tensor:
    """Values below the `low` quantile and above the `1 - high` quantile become these."""
    size = X.numel()
    least = rank_from_top(X, size - min(math.floor(size * low), size - 1))
    most = rank_from_top(X, size - max(math.floor(size * (1 - high)) - 1, 0)) if high else float(X.max())
    return X.clamp(min=least, max=most)


def unit(X: Tensor) -> Tensor:
    """Scaled to [0, 1]; all zero when all elements are equal."""
    low, high = X.min(), X.max()
    return (X - low) / (high - low) if high > low else torch.zeros_like(X)
