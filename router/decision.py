"""A decision: which expert, blend or gated composite answers a prompt. Plain data, alike for all methods."""

from __future__ import annotations

import uuid
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Kind = Literal["base", "select", "blend", "gate"]


class Candidate(BaseModel):
    """An expert that was considered, with the method's raw score (higher is better)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    expert: str
    version: int
    score: float


class Weighted(BaseModel):
    """An expert that answers, with its weight: the router's are shares in [0, 1], a caller's may be any number."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    expert: str
    id: str
    weight: float = 1.0


class Verdict(BaseModel):
    """What follows from the evidence E that a probe reads from the prompt: p = softmax(log prior + beta E).

    The likeliest expert answers, or with `blend` all of them in proportion to p.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    beta: float = Field(default=0.002, gt=0)
    blend: bool = False


class Decision(BaseModel):
    """What the router decided for one prompt.

    `base` abstains (no experts); `select` names one expert; `blend` and `gate` name several. A blend's experts are
    merged with their weights by an operator, a name in `router.blending.OPERATORS`; where a gate computes the same, the
    decision has both. A gate, a name in
    `router.gating.GATES`, weighs its experts token by token; their own weights are what it starts from. With a
    `verdict` the gate only reads the prompt, and what it finds decides who answers. Its experts may be prepared: an
    expert of general knowledge, `general` by id, subtracted from each, and each cut to its `compress` strongest
    directions.
    `confidence` is in [0, 1]; `threshold` is the score under which the method abstains.
    `timings` are milliseconds by stage (`encode`, `search`, `total`); `generation` is the registry's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(default_factory=lambda: f"dec-{uuid.uuid4().hex}")
    method: str
    kind: Kind
    experts: tuple[Weighted, ...] = ()
    operator: str | None = None
    operator_settings: dict[str, Any] = Field(default_factory=dict)
    gate: str | None = None
    gate_settings: dict[str, Any] = Field(default_factory=dict)
    verdict: Verdict | None = None
    general: str | None = None
    compress: int | None = None
    confidence: float = 0.0
    threshold: float | None = None
    candidates: tuple[Candidate, ...] = ()
    timings: dict[str, float] = Field(default_factory=dict)
    generation: int = 0
    reason: str = ""

    @property
    def summary(self) -> str:
        """`name=weight` of all who have a part in the answer, comma-separated."""
        return ",".join(f"{each.expert}={each.weight:.4g}" for each in self.experts if each.weight)
