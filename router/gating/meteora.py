"""MeteoRA: a trained linear gate over the experts of every module."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from router.gating.gate import GateSettings, ScoreGate, Settings, Step, Table
from router.taxonomy import Reference, Taxonomy


class MeteoraSettings(GateSettings):
    top_k: int | None = Field(default=2, ge=1)


class Meteora(ScoreGate):
    """s_k = w_k . x, softmax over the top k. w_k is expert k's row of the module's gate, an extra row."""

    equation: ClassVar[str] = "`w_k · x`"
    reads: ClassVar[str] = "extra row k"
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        expert_training="standard",
        expert_data="shared",
        routing_data="expert",
        input="step",
        depth="module",
        selection="sparse",
        aggregation="output",
        generalization="in-distribution",
        user_data="zero-shot",
        reference=Reference(title="MeteoRA (Xu et al. 2024)", url="https://arxiv.org/abs/2405.13053"),
    )
    Settings: ClassVar[type[Settings]] = MeteoraSettings
    name: str = "meteora"
    extra: ClassVar[bool] = True

    def score(self, z: Tensor, table: Table, step: Step) -> Tensor:
        return self.blocks.extra_rows(z)
