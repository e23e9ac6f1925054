"""LAG: Arrow finds a few candidates cheaply, SpectR picks one of them."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from router.gating.gate import WEIGHTS_ONLY, Settings, Step, Table
from router.gating.layout import Layout
from router.gating.spectr import SpectR, SpectRSettings
from router.taxonomy import Reference, Taxonomy


class LAGSettings(SpectRSettings):
    """top_k  how many experts Arrow leaves to SpectR; one of them answers"""

    top_k: int | None = Field(default=20, ge=1)


class LAG(SpectR):
    """Per token and module: T = the k experts with the largest |v_k . x|, then argmax over T of |s_k B_k A_k x|.

    With k at least the number of members this is SpectR's argmax.
    """

    equation: ClassVar[str] = "Arrow keeps `top_k`, of which the largest `norm(s_k B_k A_k x)` answers alone"
    reads: ClassVar[str] = "first rows / (s_k sigma_1), and lengths"
    taxonomy: ClassVar[Taxonomy] = replace(
        WEIGHTS_ONLY,
        aggregation="none",
        reference=Reference(title="LAG (Fleshman and Van Durme 2025)", url="https://arxiv.org/abs/2507.05346"),
    )
    Settings: ClassVar[type[Settings]] = LAGSettings

    def __init__(self, layout: Layout, device: torch.device | str = "cpu") -> None:
        super().__init__(layout, device)
        self.filters = self.k < len(layout.members)
        self.needs_scale = self.filters and self.form == "scaled"

    def weights(self, z: Tensor, table: Table, step: Step) -> Tensor:
        scores = self.pooled(self.scores(z, table, step), table)
        if self.filters:
            candidates = self.pooled(self.arrow(z, table), table).topk(self.k, -1).indices  # (t, n, k)
            best = scores.gather(-1, candidates).argmax(-1, keepdim=True)
            winner = candidates.gather(-1, best)  # (t, n, 1)
        else:
            winner = scores.argmax(-1, keepdim=True)
        weights = torch.zeros_like(scores).scatter_(-1, winner, 1.0)
        return weights if table.absent is None else weights.masked_fill_(table.absent, 0.0)

    def arrow(self, z: Tensor, table: Table) -> Tensor:
        """(t, n, R) -> (t, n, K) |v_k . x|"""
        first = self.blocks.first_rows(self.centred(z, table)).abs()
        return first if self.form == "unit" else first / table.loudest
