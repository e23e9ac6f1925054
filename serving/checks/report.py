"""What a check found: plain, frozen data that is kept with the version."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import Field, FiniteFloat, ValidationError

from adapters_registry.expert import Expert, Frozen
from serving.config import CheckName
from serving.errors import ApiError

#: The key under which a version's latest report is kept.
KEY = "report"
#: Rows of one section, and experts that one sentence names.
MOST_ROWS, MOST_NAMED = 50, 5

Cell = str | int | FiniteFloat | None


class Section(Frozen):
    """One check of a version.

    passed  None: it could not be measured; `detail` says why
    figure  what decides, and `limit` what it must not pass; None: there is nothing to measure it by
    rows    what the figure was made of: columns by name, the same in every row
    """

    name: CheckName
    passed: bool | None
    figure: FiniteFloat | None = None
    limit: FiniteFloat | None = None
    detail: str
    rows: tuple[dict[str, Cell], ...] = ()


class Report(Frozen):
    """All checks of one version.

    generation  of the registry that it was compared with
    method      of the router, whose decisions were compared
    notes       what a reader should know about all of it
    """

    object: Literal["expert.check"] = "expert.check"
    name: str
    version: int
    digest: str
    generation: int
    made_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    method: str
    sections: tuple[Section, ...]
    notes: tuple[str, ...] = ()

    def section(self, name: CheckName) -> Section | None:
        return next((each for each in self.sections if each.name == name), None)


class CheckNotFound(ApiError):
    """No report is kept of this version."""

    status, code = 404, "check_not_found"

    def __init__(self, expert: Expert) -> None:
        super().__init__(
            f"Version {expert.version} of '{expert.name}' has not been checked. Run `moerge expert check {expert.name} "
            f"--version {expert.version}`, or POST /v1/experts/{expert.name}/check?version={expert.version}."
        )


def read_report(data: dict[str, Any] | None) -> Report | None:
    """A stored report; None for one that an older release wrote in another form: it has to be made again."""
    try:
        return None if data is None else Report.model_validate(data)
    except ValidationError:
        return None


def listed(parts: Sequence[str]) -> str:
    """The first few, in a sentence."""
    more = f" and {len(parts) - MOST_NAMED} more" if len(parts) > MOST_NAMED else ""
    return ", ".join(parts[:MOST_NAMED]) + more
