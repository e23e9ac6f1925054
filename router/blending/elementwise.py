"""What operators on the single elements of dW share: pruning, random masks, the election of signs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from router.blending.operator import BlendSettings, Density, Seeded

Mean = Literal["weights", "count"]


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
    return X.masked_fill(magnitude < rank_from_top(magnitude, count), 0)


def rank_from_top(X: Tensor, count: int) -> float:
    """The count-th largest element of X. (NumPy's selection takes half the time of torch's.)"""
    at = X.numel() - count
    return float(np.partition(X.numpy().ravel(), at)[at])


def random_mask(X: Tensor, probability: float | Tensor, seed: int) -> Tensor:
    """1 where an element is kept, 0 where it is dropped; `probability` one for all or (d_out, d_in)."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(X.shape, generator=generator) < probability).to(X.dtype)


def drop_and_rescale(X: Tensor, density: float, seed: int) -> Tensor:
    """DARE (Yu et al. 2024): drop elements at random and divide the others by the density: the mean stays."""
    if density >= 1:
        return X
    return X * random_mask(X, density, seed) / density


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
    votes = total(deltas, weights if mean == "weights" else [1.0] * len(deltas))
    positive = votes >= 0
    result, counted = torch.zeros_like(votes), torch.zeros_like(votes)
    for delta, weight in zip(deltas, weights, strict=True):
        votes_up = delta < 0 if mean == "weights" and weight < 0 else delta > 0
        agrees = (votes_up == positive) & (delta != 0)
        result.addcmul_(delta, agrees.to(delta.dtype), value=weight)
        counted.add_(agrees, alpha=abs(weight) if mean == "weights" else 1)
    return torch.where(counted > 0, result / counted, 0.0)
