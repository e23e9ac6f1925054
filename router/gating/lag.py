"""LAG: Arrow finds a few candidates cheaply, SpectR picks one of them."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from router.gating.blocks import mean_over_modules
from router.gating.gate import Settings, Step, Table
from router.gating.layout import Layout
from router.gating.spectr import SpectR, SpectRSettings
from router.taxonomy import Reference, Taxonomy


class LAGSettings(SpectRSettings):
    """top_k  how many experts Arrow leaves to SpectR; one of them answers"""

    top_k: int | None = Field(default=20, ge=1)


class LAG(SpectR):
    """Per token and module: T = the k experts with the largest |v_k . x|, then argmax over T of |s_k B_k A_k x|
    (section 3). With k at least the number of members this is SpectR's argmax.
    """

    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        expert_training="standard",
        expert_data="private",
        routing_data="none",
        input="step",
        depth="module",
        selection="sparse",
        aggregation="none",
        generalization="out-of-distribution",
        user_data="zero-shot",
        reference=Reference(title="LAG (Fleshman and Van Durme 2025)", url="https://arxiv.org/abs/2507.05346"),
    )
    Settings: ClassVar[type[Settings]] = LAGSettings

    def __init__(self, layout: Layout, device: torch.device | str = "cpu") -> None:
        super().__init__(layout, device)
        self.candidates, self.k = self.k, 1
        self.filters = self.candidates < len(layout.members)
        self.needs_scale = self.filters and self.form == "scaled"

    def score(self, z: Tensor, table: Table, step: Step) -> Tensor:
        """SpectR's score of the experts that Arrow leaves, -inf for the others."""
        scores = super().score(z, table, step)
        if not self.filters:
            return scores
        arrow = self.blocks.first_rows(z).abs()
        if self.form == "scaled":
            arrow = arrow / table.loudest
        if self.settings.shared and arrow.shape[1] > 1:
            arrow = mean_over_modules(arrow, table.present)
        if table.absent is not None:
            arrow = arrow.masked_fill(table.absent, -1.0)
        best = arrow.topk(self.candidates, -1).indices  # (t, n, k)
        return torch.full_like(scores, float("-inf")).scatter_(-1, best, scores.gather(-1, best))
