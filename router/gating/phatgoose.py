"""PHATGOOSE: a gate vector for each expert and module, trained after the expert on the expert's own data."""

from __future__ import annotations

import math
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from router.gating.gate import TINY, GateSettings, ScoreGate, Settings, Step, Table
from router.taxonomy import Reference, Taxonomy


class PhatgooseSettings(GateSettings):
    top_k: int | None = Field(default=2, ge=1)


class Phatgoose(ScoreGate):
    """s_k = LN(x) . LN(v_k) / sqrt(d); softmax over the top 2. LN(a) = (a - mean(a)) / std(a).

    LN(v) has mean zero, so LN(x) . LN(v) = x . LN(v) / std(x): with the extra row LN(v_k) / sqrt(d) the score is
    that row of z divided by std(x).
    """

    equation: ClassVar[str] = "`LN(x) · LN(v_k) / sqrt(d)`"
    reads: ClassVar[str] = "extra row k / std(x)"
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        expert_training="custom",
        expert_data="private",
        routing_data="expert",
        input="step",
        depth="module",
        selection="sparse",
        aggregation="output",
        generalization="out-of-distribution",
        user_data="zero-shot",
        reference=Reference(title="PHATGOOSE (Muqeeth et al. 2024)", url="https://arxiv.org/abs/2402.05859"),
    )
    Settings: ClassVar[type[Settings]] = PhatgooseSettings
    name: str = "phatgoose"
    extra: ClassVar[bool] = True
    needs_spread: bool = True

    @classmethod
    def row(cls, vector: Tensor) -> Tensor:
        """LN(v) / sqrt(d)"""
        spread = vector.std(correction=0).clamp_min(TINY)
        return (vector - vector.mean()) / (spread * math.sqrt(vector.numel()))

    def score(self, z: Tensor, table: Table, step: Step) -> Tensor:
        assert step.spread is not None
        return self.blocks.extra_rows(z) / step.spread.clamp_min(TINY)
