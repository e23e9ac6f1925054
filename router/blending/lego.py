"""LoRA-LEGO: rank-one units of all members, clustered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from router.blending.operator import Operator, Seeded, Share
from router.lowrank import Factors, svd
from router.taxonomy import Reference

ROUNDS = 100


class Lego(Operator):
    """The rank-one units (a_j, b_j) of all members are clustered by k-means; every cluster's mean becomes one unit.

    Means are shorter than what they are means of: each is stretched to its cluster's mean length (parameter
    reweighting). With k instead of r units the output's variance shrinks: everything is multiplied with sqrt(r / k)
    (output reweighting), r the mean rank of the members. Weights weigh units within clusters.
    """

    class Settings(Seeded):
        """units     singular: the members' singular directions, so that only dW matters; trained: the rows of A and
                  columns of B as they are stored (as published), which a rotation of the factors changes
        clusters  k, the rank of the result; None: the largest member's
        """

        units: Literal["singular", "trained"] = "singular"
        clusters: int | None = Field(default=None, ge=1)

    formula = "k-means over rank-one units, reweighted"
    reference = Reference(title="LoRA-LEGO (Zhao et al. 2024)", url="https://arxiv.org/abs/2409.16167")
    exact = True
    relative = True

    def merge(self, module: str, shares: Sequence[Share]) -> Factors | Tensor:
        parts = [self.units(share) for share in shares]
        units = torch.cat(parts)  # (n, d_out + d_in)
        weights = torch.cat(
            [torch.full((len(part),), abs(share.weight)) for part, share in zip(parts, shares, strict=True)]
        )
        k = min(self.settings.clusters or max(share.rank for share in shares), len(units))
        labels = k_means(units, k, self.settings.seed)
        lengths = units.norm(dim=1)
        merged = torch.zeros(k, units.shape[1])
        for cluster in range(k):
            w = weights * (labels == cluster)
            w = w / w.sum()
            mean = w @ units
            length = mean.norm()
            merged[cluster] = mean * (w @ lengths / length) if length > 0 else mean
        merged *= (sum(share.rank for share in shares) / len(shares) / k) ** 0.25  # on both factors: sqrt in all
        d_out = shares[0].B.shape[0]
        return Factors(B=merged[:, :d_out].mT.contiguous(), A=merged[:, d_out:].contiguous())

    def units(self, share: Share) -> Tensor:
        """(r, d_out + d_in): b_j and a_j side by side, the scale shared between them."""
        if self.settings.units == "singular":
            U, S, Vt = svd(share.factors)
            strongest = U.gather(0, U.abs().argmax(0)[None])[0]  # a singular vector's sign is arbitrary: fix it
            sign = torch.where(strongest < 0, -1.0, 1.0)
            B, A = U * (sign * S.sqrt()), (sign * S.sqrt())[:, None] * Vt
        else:
            root = math.sqrt(abs(share.scale))
            B, A = share.B.float() * root, share.A.float() * math.copysign(root, share.scale)
        return torch.cat([B.mT * (1 if share.weight > 0 else -1), A], 1)

    def rows(self, module: str, ranks: Mapping[str, int]) -> int:
        return min(self.settings.clusters or max(ranks.values()), sum(ranks.values()))


def k_means(points: Tensor, k: int, seed: int) -> Tensor:
    """(n, d) -> (n,) the cluster of each, k of them and none empty. Lloyd's algorithm from a k-means++ start."""
    points = points.double()
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    for _ in range(1, k):
        distance = torch.cdist(points, points[chosen]).min(1).values.square()
        distance[chosen] = 0
        if not distance.any():  # the rest are copies of chosen ones: take any
            distance = torch.ones(len(points)).index_fill_(0, torch.tensor(chosen), 0.0)
        chosen.append(int(torch.multinomial(distance, 1, generator=generator)))
    centres = points[chosen]
    labels = torch.full((len(points),), -1)
    for _ in range(ROUNDS):
        distance = torch.cdist(points, centres)
        new = distance.argmin(1)
        for cluster in range(k):  # an empty one takes the point that is farthest from its own centre
            if not (new == cluster).any():
                own = distance.gather(1, new[:, None])[:, 0]
                own[torch.bincount(new, minlength=k)[new] < 2] = -1
                new[own.argmax()] = cluster
        if torch.equal(new, labels):
            break
        labels = new
        centres = torch.stack([points[labels == cluster].mean(0) for cluster in range(k)])
    return labels
