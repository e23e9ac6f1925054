"""SMILE: the expert whose strongest input directions hold most of the token's input."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from router.gating.blocks import Blocks
from router.gating.gate import WEIGHTS_ONLY, GateSettings, ScoreGate, Settings, Step, Table
from router.gating.layout import Form, Layout
from router.taxonomy import Reference, Taxonomy


class SmileSettings(GateSettings):
    """k_gate  how many of an expert's directions count"""

    k_gate: int = Field(default=16, ge=1)


class Smile(ScoreGate):
    """s_k = |V_k[:k_gate]^T x|: no singular values, so a loud expert has no advantage."""

    equation: ClassVar[str] = "`norm(V_k[:k_gate]ᵀ x)`"
    reads: ClassVar[str] = "length of the first rows of block k"
    taxonomy: ClassVar[Taxonomy] = replace(
        WEIGHTS_ONLY,
        reference=Reference(title="SMILE (Tang et al. 2024)", url="https://arxiv.org/abs/2408.10174"),
    )
    Settings: ClassVar[type[Settings]] = SmileSettings
    form: Form = "unit"

    def __init__(self, layout: Layout, device: torch.device | str = "cpu") -> None:
        super().__init__(layout, device)
        self.blocks = Blocks(layout.blocks, device, measured=self.settings.k_gate)
        self.name = f"smile-{self.settings.k_gate}"

    def score(self, z: Tensor, table: Table, step: Step) -> Tensor:
        return self.blocks.norms(z)
