"""The layout of a composite: which rows of its stacked rank belong to which expert, and which gate weighs them.

It travels in the composite's `adapter_config.json`, beside the tensors, from whoever builds a composite to the
engine's plugin that gates it.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

#: Key of `adapter_config.json` that holds the layout.
KEY = "moerge_gate"
#: `init_lora_weights` of a composite. PEFT and stock vLLM refuse it, so that nobody sums all experts by mistake.
MARK = "moerge-gated"
#: File beside `adapter_model.safetensors` with the gate's constants, tensors named `<module>.<table>`.
TABLES = "gate.safetensors"
#: The layout's version: an engine refuses those that it does not know.
FORMAT = 1

Form = Literal["unit", "scaled"]


class Member(BaseModel):
    """One expert of a composite; `rows` are the rank rows of its block, the same in every module."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    rows: int = Field(gt=0)


class Layout(BaseModel):
    """gate      a name in `router.gating.GATES`
    settings  the gate's settings, as JSON
    members   experts in the order of their blocks
    extra     rows after the blocks that only feed the gate (their columns of B are zero): 0, or one per member
    form      unit:   block rows are V^T, B's columns U S s:   z = V^T x
              scaled: block rows are s S V^T, B's columns U:   z = s S V^T x
    notes     what a person should know about these members, found while building; nothing depends on it
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    gate: str
    settings: dict[str, Any] = {}
    members: tuple[Member, ...] = Field(min_length=2)
    extra: int = Field(default=0, ge=0)
    form: Form = "scaled"
    notes: tuple[str, ...] = ()

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(member.rows for member in self.members)

    @property
    def starts(self) -> tuple[int, ...]:
        """The first row of every block."""
        return tuple(sum(self.blocks[:k]) for k in range(len(self.members)))

    @property
    def rank(self) -> int:
        """Rows of A in all."""
        return sum(self.blocks) + self.extra

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.extra not in (0, len(self.members)):
            raise ValueError(f"{self.extra} extra rows for {len(self.members)} members; there must be none or one each")
        ids = [member.id for member in self.members]
        if len(set(ids)) != len(ids):
            raise ValueError(f"a member occurs twice: {', '.join(sorted(ids))}")
        return self
