"""What the registry knows about an expert: plain, frozen data that flows down to the router and the server."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Visibility = Literal["public", "private"]


def _storable(text: str) -> str:
    text.encode()  # a lone surrogate is no character
    if "\0" in text:  # PostgreSQL cannot store it
        raise ValueError("contains a NUL character; remove it")
    return text


Text = Annotated[str, AfterValidator(_storable)]


class State(StrEnum):
    """Where a version stands. Only the `active` version of a name is routed to."""

    STAGED = "staged"
    ACTIVE = "active"
    RETIRED = "retired"
    QUARANTINED = "quarantined"


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Sample(Frozen):
    """A prompt that the expert was made for, with the answer it should give when that is known."""

    prompt: Text = Field(min_length=1)
    answer: Text | None = None


class Check(Frozen):
    """The result of one check on a version, with the figure that decided it."""

    name: str
    passed: bool
    value: float | None = None
    limit: float | None = None
    detail: str = ""


class Expert(Frozen):
    """One immutable version of a registered adapter.

    `digest` is the sha256 (hex) of the adapter's content, so `(name, digest)` never changes meaning;
    `path` is a PEFT directory in the content-addressed store.
    """

    name: str
    version: int = Field(ge=1)
    digest: str
    state: State
    path: Path
    base_model: str
    rank: int
    target_modules: tuple[str, ...]
    source: str
    description: Text = ""
    licence: Text | None = None
    tags: tuple[Text, ...] = ()
    owner: Text | None = None
    visibility: Visibility = "public"
    training_data: tuple[Text, ...] = ()
    samples: tuple[Sample, ...] = ()
    checks: tuple[Check, ...] = ()
    reasons: tuple[str, ...] = ()
    created_at: datetime = Field(default_factory=lambda: datetime.now(UTC))

    @property
    def id(self) -> str:
        """Unique for name and content, `reverse@1f2e3d4c5b6a`: the name under which an engine loads it."""
        return f"{self.name}@{self.digest[:12]}"

    def visible_to(self, tenant: str | None) -> bool:
        """Private experts exist for their owner only; `tenant` None is the operator, who sees all."""
        return self.visibility == "public" or tenant is None or tenant == self.owner
