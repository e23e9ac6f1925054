"""Operations on the blocks of a rank-space buffer. When all blocks are equal they are views; else an index is kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Blocks:
    """K blocks of `rows[k]` rank rows at the start of a buffer z (t, n, R); extra rows may follow them.

    `measured` is how many rows of a block its length is taken over; None: all.
    """

    def __init__(self, rows: Sequence[int], device: torch.device | str = "cpu", measured: int | None = None) -> None:
        self.K = len(rows)
        self.total = sum(rows)
        self.equal = rows[0] if len(set(rows)) == 1 else None
        self.measured = None if measured is None or measured >= max(rows) else measured
        count = torch.tensor(rows)
        first = count.cumsum(0) - count
        owner = torch.arange(self.K).repeat_interleave(count)
        place = torch.arange(self.total) - first[owner]
        counts = place < (self.measured or self.total)
        self.first = first.to(device)  # (K,) where a block starts
        self.owner = owner.to(device)  # (total,) which block a row is in
        self.member = (torch.nn.functional.one_hot(owner, self.K) * counts.unsqueeze(-1)).float().to(device)

    def split(self, z: Tensor, rows: int) -> Tensor:
        """(t, n, R) -> (t, n, K, rows) a view."""
        t, n, R = z.shape
        if self.total < R:
            z = z.narrow(-1, 0, self.total)
        return z.view(t, n, self.K, rows)

    def multiply(self, z: Tensor, weights: Tensor) -> None:
        """Multiply block k of z (t, n, R) by weights[..., k] (t, n, K), in place."""
        if self.equal is not None:
            self.split(z, self.equal).mul_(weights.unsqueeze(-1))
        else:
            z.narrow(-1, 0, self.total).mul_(weights.index_select(-1, self.owner))

    def first_rows(self, z: Tensor) -> Tensor:
        """(t, n, R) -> (t, n, K) the first row of every block."""
        if self.equal is not None:
            return self.split(z, self.equal).select(-1, 0)
        return z.index_select(-1, self.first)

    def extra_rows(self, z: Tensor) -> Tensor:
        """(t, n, R) -> (t, n, K) the rows after the blocks, one for each expert."""
        return z.narrow(-1, self.total, self.K)

    def norms(self, z: Tensor) -> Tensor:
        """(t, n, R) -> (t, n, K) Euclidean length of every block, of its first rows if `measured`."""
        if self.equal is not None:
            blocks = self.split(z, self.equal)
            if self.measured is not None:
                blocks = blocks.narrow(-1, 0, self.measured)
            lengths: Tensor = torch.linalg.vector_norm(blocks, dim=-1)
            return lengths
        z = z.narrow(-1, 0, self.total)
        return (z * z).matmul(self.member).sqrt_()


def mean_over_modules(scores: Tensor, present: Tensor | None) -> Tensor:
    """(t, n, K) -> (t, n, K) every module gets the mean over those modules that the expert adapts."""
    if present is None:
        return scores.mean(1, keepdim=True).expand_as(scores)
    share = present / present.sum(0, keepdim=True).clamp(min=1)  # (n, K)
    return (scores * share).sum(1, keepdim=True).expand_as(scores)
