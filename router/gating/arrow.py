"""Arrow: the expert whose strongest input direction is most like the token's own input."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from router.gating.gate import WEIGHTS_ONLY, ScoreGate, Step, Table
from router.gating.layout import Form
from router.taxonomy import Reference, Taxonomy


class Arrow(ScoreGate):
    """s_k = |v_k . x| with v_k the first right singular vector of B_k A_k, whose sign is arbitrary.

    In unit form a block's first row is v_k itself. PEFT and the paper ignore the adapter's scale s_k here.
    """

    equation: ClassVar[str] = "`abs(v_k · x)`"
    reads: ClassVar[str] = "first row of block k"
    taxonomy: ClassVar[Taxonomy] = replace(
        WEIGHTS_ONLY,
        reference=Reference(title="Arrow (Ostapenko et al. 2024)", url="https://arxiv.org/abs/2405.11157"),
    )
    name: str = "arrow"
    form: Form = "unit"

    def score(self, z: Tensor, table: Table, step: Step) -> Tensor:
        return self.blocks.first_rows(z).abs()
