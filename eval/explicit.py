"""Gates as their papers write them: on the dense dW_k x of every expert, not on rank rows. Slow, and plainly right."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from router.gating import GATES
from router.gating.gate import Step, Table
from router.gating.layout import Layout

FORMULAS = ("arrow", "spectr", "smile", "constant", "evidence", "probe")


class Explicit:
    """Weights and outputs of one composite. All that it knows of expert k is `dW_k = B_k A_k` of each module."""

    def __init__(self, layout: Layout) -> None:
        if layout.gate not in FORMULAS:
            raise ValueError(f"No explicit formula for the gate '{layout.gate}'; there are: {', '.join(FORMULAS)}.")
        self.layout = layout
        self.settings: Any = GATES[layout.gate].Settings.model_validate(layout.settings)
        self.score = getattr(self.settings, "score", layout.gate)
        self._directions: dict[int, list[Tensor]] = {}  # by group, n each

    def __call__(self, x: Tensor, A: Tensor, B: list[Tensor], table: Table, step: Step) -> list[Tensor]:
        """x (t, d_in), A (n, R, d_in), B n times (d_out, R) -> n times the blended output (t, d_out)."""
        outputs = [torch.einsum("kod,td->tko", self.deltas(A[i], B[i]), x) for i in range(len(B))]  # dW_k x
        if self.layout.gate == "constant":
            weights = self.brought(len(x), step)[:, None].expand(-1, len(B), -1)
        else:
            scores = self.normalised(self.scores(x, A, B, outputs, table), x, table)
            stateful = self.layout.gate in ("evidence", "probe")
            weights = self.accumulate(scores, table, step) if stateful else self.softmax(scores, table)
        return [torch.einsum("tk,tko->to", weights[:, i], output) for i, output in enumerate(outputs)]

    def deltas(self, A: Tensor, B: Tensor) -> Tensor:
        """(K, d_out, d_in)"""
        edges = [sum(self.layout.blocks[:k]) for k in range(len(self.layout.blocks) + 1)]
        return torch.stack([B[:, a:b] @ A[a:b] for a, b in itertools.pairwise(edges)])

    def brought(self, t: int, step: Step) -> Tensor:
        """(t, K) the weights that requests brought along, uniform where none."""
        uniform = torch.full((t, len(self.layout.members)), 1 / len(self.layout.members))
        return uniform if step.given is None else torch.where(step.given.isnan(), uniform, step.given)

    def scores(self, x: Tensor, A: Tensor, B: list[Tensor], outputs: list[Tensor], table: Table) -> Tensor:
        """(t, n, K): |v_k x| (Arrow), |dW_k x| (SpectR), |V_k^T x| (SMILE)"""
        if self.score == "spectr":
            return torch.stack([output.norm(dim=-1) for output in outputs], 1)
        if table.index not in self._directions:
            self._directions[table.index] = [self.directions(A[i], B[i]) for i in range(len(B))]
        parts = [torch.einsum("krd,td->tkr", V, x) for V in self._directions[table.index]]
        return torch.stack([torch.linalg.vector_norm(part, dim=-1) for part in parts], 1)

    def directions(self, A: Tensor, B: Tensor) -> Tensor:
        """V^T (K, r, d_in) of every dW_k, rows that do not count zero."""
        _, S, Vh = torch.linalg.svd(self.deltas(A.double(), B.double()), full_matrices=False)
        kept: Tensor = 1e-5 * S[:, :1] < S  # the other directions are arbitrary
        kept[:, 1:] &= self.score != "arrow"
        V: Tensor = Vh * kept[..., None]
        return V.float()

    def normalised(self, scores: Tensor, x: Tensor, table: Table) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1)[:, None, None]
        result = scores
        match self.settings.normalise:
            case "unit":
                result = scores / length
            case "rms":
                result = scores / (length / x.shape[-1] ** 0.5)
            case "zscore":
                assert table.mean is not None
                assert table.deviation is not None
                result = (scores - table.mean) / table.deviation
        return result

    def softmax(self, scores: Tensor, table: Table) -> Tensor:
        """(t, n, K): over the best `top_k` of the experts that adapt a module, token by token."""
        t, n, K = scores.shape
        adapts = self.adapts(n, table)
        weights = torch.zeros_like(scores)
        for i in range(n):
            those = adapts[i].nonzero()[:, 0].tolist()
            shares = scores[:, i]
            if self.settings.shared:
                shares = torch.stack([scores[:, adapts[:, k], k].mean(1) for k in range(K)], 1)
            for token in range(t):
                row: list[float] = shares[token].tolist()
                best = sorted(those, key=row.__getitem__, reverse=True)[: self.settings.top_k or K]
                if best:
                    weights[token, i, best] = torch.softmax(shares[token, best] / self.settings.temperature, 0)
        return weights

    def accumulate(self, scores: Tensor, table: Table, step: Step) -> Tensor:
        """(t, n, K): zero (probe), or softmax(log prior + beta E)."""
        assert step.evidence is not None
        t, n, _ = scores.shape
        E = step.evidence.add(table.index, (scores * self.adapts(n, table)).sum(1))  # (t, K)
        if self.layout.gate == "probe":
            return torch.zeros_like(scores)
        weights = self.brought(t, step) * torch.exp(self.settings.beta * (E - E.amax(1, keepdim=True)))
        return (weights / weights.sum(1, keepdim=True))[:, None].expand(-1, n, -1)

    def adapts(self, n: int, table: Table) -> Tensor:
        """(n, K) bool"""
        return torch.ones(n, len(self.layout.members), dtype=torch.bool) if table.present is None else table.present
