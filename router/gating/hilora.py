"""HiLoRA's token stage: single directions of the experts compete, not experts."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from router.gating.gate import NOTHING, WEIGHTS_ONLY, Gate, Settings, Step, Table
from router.gating.layout import Layout
from router.taxonomy import Reference, Taxonomy


class HiLoRASettings(Settings):
    """components  rank-one components that answer a token, of all experts together; None: as many as the largest
    expert has, so that a token costs one expert's work
    """

    components: int | None = Field(default=None, ge=1)


class HiLoRA(Gate):
    """B_k A_k = sum_j b_j a_j; a token keeps the components with the largest |a_j . x|.

    Departure: the paper takes the rank-one components as they were trained, which depend on how B A happens to be
    factored. In scaled form |z_j| is the length of what the j-th singular direction adds to the output, which does not.
    The sequence stage (which experts, by Gaussians over sample embeddings) is what makes the shortlist of members.
    """

    equation: ClassVar[str] = "of all experts' directions j those with the largest `abs(s sigma_j v_j · x)` answer"
    reads: ClassVar[str] = "single rows"
    taxonomy: ClassVar[Taxonomy] = replace(
        WEIGHTS_ONLY,
        reference=Reference(title="HiLoRA (Han et al. 2025)", url="https://arxiv.org/abs/2510.12266"),
    )
    Settings: ClassVar[type[Settings]] = HiLoRASettings

    def __init__(self, layout: Layout, device: torch.device | str = "cpu") -> None:
        super().__init__(layout, device)
        self.components = min(self.settings.components or max(layout.blocks), sum(layout.blocks))

    def kept(self, z: Tensor) -> Tensor:
        """(t, n, R) -> (t, n, R) 1 where a component answers, else 0."""
        which = z.abs().topk(self.components, -1).indices
        return torch.zeros_like(z).scatter_(-1, which, 1.0)

    def weights(self, z: Tensor, table: Table, step: Step) -> Tensor:
        """(t, n, K) the share of the kept components that are an expert's."""
        return self.kept(z).matmul(self.blocks.member) / self.components

    def __call__(self, z: Tensor, table: Table, step: Step = NOTHING) -> Tensor:
        """Rows are masked here, not blocks weighed."""
        kept = self.kept(z)
        z.mul_(kept)
        return kept.matmul(self.blocks.member) / self.components
