"""DELLA-Merging: drop by magnitude, rescale, elect, average."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from router.blending.elementwise import Dropped, Electing, elect, random_mask
from router.blending.operator import Operator, Share
from router.lowrank import Factors
from router.taxonomy import Reference

ROWS = 512  # that are sorted at once


class Della(Operator):
    """Within a row, the larger an element the likelier it is kept: p from density - epsilon for the smallest to
    density + epsilon for the largest, evenly by rank. Kept elements are divided by their p; then as in TIES.
    """

    class Settings(Dropped, Electing):
        """epsilon  half the range of the probabilities; density +- epsilon must lie in (0, 1)
        scale    lambda, multiplies the result
        """

        epsilon: float = Field(default=0.1, ge=0, lt=0.5)
        scale: float = 1.0

    formula = "λ · mean of (mask * dW) / p, larger elements kept likelier, that agree with the elected sign"
    reference = Reference(title="DELLA (Deep et al. 2024)", url="https://arxiv.org/abs/2406.11617")
    relative = True

    def merge(self, module: str, shares: Sequence[Share]) -> Factors | Tensor:
        dropped = []
        for share in shares:
            delta = share.dense()
            p = self.probability(delta)
            dropped.append(delta * random_mask(delta, p, share.seed) / p)
        return elect(dropped, [share.weight for share in shares], self.settings.mean).mul_(self.settings.scale)

    def probability(self, delta: Tensor) -> Tensor:
        """With what probability each element (d_out, d_in) is kept."""
        density, epsilon = self.settings.density, self.settings.epsilon
        d_in = delta.shape[1]
        if density == 1 or d_in == 1:
            return torch.full_like(delta, density)
        even = np.linspace(density - epsilon, density + epsilon, d_in, dtype=np.float32)  # smallest to largest
        p = torch.empty_like(delta)
        for start in range(0, len(delta), ROWS):  # NumPy sorts in half of torch's time
            order = np.argsort(delta[start : start + ROWS].abs().numpy(), axis=1)
            np.put_along_axis(p[start : start + ROWS].numpy(), order, even[None], axis=1)
        return p

    def refuse(self, weights: Mapping[str, float], modules: Sequence[str]) -> Iterator[str]:
        density, epsilon = self.settings.density, self.settings.epsilon
        if density < 1 and not 0 < density - epsilon <= density + epsilon < 1:
            yield f"density {density} +- epsilon {epsilon} leaves (0, 1); a smaller epsilon would do."
