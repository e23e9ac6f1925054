"""Evidence of running requests, kept beside the KV cache.

Each physical KV block has a row `(groups, K)`: for every group of modules the sum of its scores over all tokens of
the request up to the last computed one in that block. A step starts from the block of the last computed token, so
whoever shares or restores KV blocks has the evidence with them: prefix caching, chunked prefill and preemption need
nothing of their own. Sums are kept in float64, so that it makes no difference how a request is cut into steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from serving.engine.batch import Batch, Request


class BlockEvidence:
    """`table (blocks, groups, K_max)`, made when the first request needs it."""

    def __init__(self, groups: int) -> None:
        self.groups = groups
        self.table = torch.zeros(0, groups, 0, dtype=torch.float64)

    def step(self, requests: Sequence[Request], batch: Batch, K: int) -> StepEvidence:
        """The evidence of one composite's requests in one step; `K` members."""
        blocks, groups, width = self.table.shape
        if blocks < batch.num_blocks or width < K:
            grown = torch.zeros(max(blocks, batch.num_blocks), groups, max(width, K), dtype=torch.float64)
            grown[:blocks, :, :width] = self.table
            self.table = grown
        return StepEvidence(self.table, requests, batch.block_size, K)


class StepEvidence:
    """`add` gives E[t, g] = sum of score[t', g'] over the request's tokens t' <= t and the groups g' <= g."""

    def __init__(self, table: Tensor, requests: Sequence[Request], block_size: int, K: int) -> None:
        self._table, self._K = table, K
        lengths = [request.tokens for request in requests]
        starts = [sum(lengths[:j]) for j in range(len(lengths))]
        rows, blocks = _ends_of_blocks(requests, starts, block_size)
        self._rows, self._blocks = torch.tensor(rows), torch.tensor(blocks)
        self._owner = torch.arange(len(requests)).repeat_interleave(torch.tensor(lengths))  # (t,) request of a row
        self._long = [slice(start, start + n) for start, n in zip(starts, lengths, strict=True) if n > 1]
        self._state = torch.zeros(table.shape[1], len(rows), K, dtype=torch.float64)  # what `store` will write
        self.total = torch.zeros(sum(lengths), K, dtype=torch.float64)  # (t, K) over the groups so far
        self._chained = self._from_this_step(requests, dict(zip(blocks, rows, strict=True)), block_size)
        last = [int(r.blocks[(r.computed - 1) // block_size]) if r.computed else 0 for r in requests]
        started = torch.tensor([r.computed > 0 for r in requests])
        before = table[torch.tensor(last), :, :K].masked_fill_(~started[:, None, None], 0.0)
        self._before = before.transpose(0, 1).contiguous()  # (groups, requests, K)

    def _from_this_step(
        self, requests: Sequence[Request], written: dict[int, int], block_size: int
    ) -> list[tuple[int, int]]:
        """(request, row) where a request starts from what another computes in this very step: a prefix they share.

        The other one has fewer tokens before the step, so in this order its own start is known first.
        """
        chained = []
        for j in sorted(range(len(requests)), key=lambda j: requests[j].computed):
            if requests[j].computed:
                row = written.get(int(requests[j].blocks[(requests[j].computed - 1) // block_size]))
                if row is not None and int(self._owner[row]) != j:
                    chained.append((j, row))
        return chained

    def add(self, index: int, score: Tensor) -> Tensor:
        """`score (t, K)` of group `index` -> (t, K)"""
        before, state = self._before[index], self._state[index]  # (requests, K), (rows to store, K)
        if self._long:
            score = score.double()
            for rows in self._long:
                score[rows] = score[rows].cumsum(0)
        for request, row in self._chained:
            before[request] = before[self._owner[row]] + score[row]
        if self._long:
            sums = score.add_(before[self._owner])
            state.copy_(sums[self._rows])
        else:
            sums = torch.add(before, score, out=state)
        self.total += sums
        return self.total.float()

    def store(self) -> None:
        """Once all groups were added: keep the sums at the end of every block, and at the last token."""
        self._table[self._blocks, :, : self._K] = self._state.transpose(0, 1)


def _ends_of_blocks(requests: Sequence[Request], starts: Sequence[int], block_size: int) -> tuple[list[int], list[int]]:
    """Rows after which a KV block is full, or its request's last in this step; and those blocks."""
    rows, blocks = [], []
    for request, start in zip(requests, starts, strict=True):
        end = request.computed + request.tokens
        for block in range(request.computed // block_size, (end - 1) // block_size + 1):
            rows.append(start + min((block + 1) * block_size, end) - 1 - request.computed)
            blocks.append(int(request.blocks[block]))
    return rows, blocks
