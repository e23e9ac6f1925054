"""What operators on the single elements of dW share: pruning, random masks, the election of signs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from router.blending.operator import BlendSettings, Density, Seeded

Mean = Literal["weights", "count"]
ROWS = 64  # at once: what they need stays in the processor's cache


class Pruned(BlendSettings):
    """density  the share of every dW's elements that is kept"""

    density: Density = 0.2


class Dropped(Seeded):
    """density  the probability with which an element of dW is kept"""

    density: Density = 0.5


class Electing(BlendSettings):
    """What operators that elect signs have besides.

    mean  weights: signs elected with weights, then the weighted mean of those that agree (mergekit with `normalize`);
          count: signs elected without weights, then the weighted sum divided by how many agree (PEFT)
    """

    mean: Mean = "weights"


def keep_largest(X: Tensor, density: float) -> Tensor:
    """The largest elements by magnitude, int(density * size) of them (and those equal to the smallest of them)."""
    count = int(density * X.numel())
    if count == 0:
        return torch.zeros_like(X)
    magnitude = X.abs()
    kept = magnitude.ge_(rank_from_top(magnitude, count))  # in place: fresh memory takes longer than arithmetic
    return kept.mul_(X)


def rank_from_top(X: Tensor, count: int) -> float:
    """The count-th largest element of X. (NumPy's selection takes half the time of torch's.)"""
    at = X.numel() - count
    return float(np.partition(X.numpy().ravel(), at)[at])


def random_mask(X: Tensor, probability: float | Tensor, seed: int) -> Tensor:
    """1 where an element is kept, 0 where it is dropped; `probability` one for all or (d_out, d_in)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(X.shape, generator=generator).lt_(probability).to(X.dtype)


def drop_and_rescale(X: Tensor, density: float, seed: int) -> Tensor:
    """DARE (Yu et al. 2024): drop elements at random and divide the others by the density: the mean stays."""
    if density >= 1:
        return X
    return random_mask(X, density, seed).mul_(X).div_(density)


def total(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i D_i"""
    result = weights[0] * deltas[0]
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        result.add_(delta, alpha=weight)
    return result


def elect(deltas: Sequence[Tensor], weights: Sequence[float], mean: Mean) -> Tensor:
    """TIES's last two steps (Yadav et al. 2023): elect every element's sign by total mass, then average those with it.

    weights: sign(sum_i w_i D_i), sum over those that agree of w_i D_i / sum |w_i|
    count:   sign(sum_i D_i),     sum over those that agree of w_i D_i / how many
    An element that is zero agrees with nobody.
    """
    result = torch.empty_like(deltas[0])
    for start in range(0, len(result), ROWS):
        rows = [delta[start : start + ROWS] for delta in deltas]
        result[start : start + ROWS] = _elected(rows, weights, mean)
    return result


def _elected(deltas: Sequence[Tensor], weights: Sequence[float], mean: Mean) -> Tensor:
    votes = total(deltas, weights if mean == "weights" else [1.0] * len(deltas))
    sign = torch.where(votes >= 0, 1.0, -1.0)
    top, counted = torch.zeros_like(votes), torch.zeros_like(votes)
    for delta, weight in zip(deltas, weights, strict=True):
        turned = mean == "weights" and weight < 0
        along = torch.mul(delta, -sign if turned else sign).clamp_(min=0)  # |D_i| where it agrees, 0 elsewhere
        top.add_(along, alpha=-weight if turned else weight)
        counted.add_(along.sign_(), alpha=abs(weight) if mean == "weights" else 1)
    return top.mul_(sign).div_(counted.masked_fill_(counted == 0, 1.0))
