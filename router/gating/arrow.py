"""Arrow: the expert whose strongest input direction is most like the token's own input."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from router.gating.gate import ScoreGate, Step, Table
from router.gating.layout import Form
from router.taxonomy import Reference, Taxonomy


class Arrow(ScoreGate):
    """s_k = |v_k . x| with v_k the first right singular vector of B_k A_k, whose sign is arbitrary (section 3.2).

    In unit form a block's first row is v_k itself. PEFT and the paper ignore the adapter's scale s_k here.
    """

    equation: ClassVar[str] = "`abs(v_k · x)`"
    reads: ClassVar[str] = "first row of block k"
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        expert_training="standard",
        expert_data="private",
        routing_data="none",
        input="step",
        depth="module",
        selection="sparse",
        aggregation="output",
        generalization="out-of-distribution",
        user_data="zero-shot",
        reference=Reference(title="Arrow (Ostapenko et al. 2024)", url="https://arxiv.org/abs/2405.11157"),
    )
    name: str = "arrow"
    form: Form = "unit"

    def score(self, z: Tensor, table: Table, step: Step) -> Tensor:
        return self.blocks.first_rows(z).abs()
