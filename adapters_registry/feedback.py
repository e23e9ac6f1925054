"""Decisions that were made, and what users thought of the answers: what a router learns from.

Of a prompt its embedding is kept, and its text only where the operator wants that. Writing a decision changes nothing
that is served, so the generation stays where it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import CursorResult, Engine, delete, func, select
from sqlalchemy.orm import Session

from adapters_registry.changes import Changes
from adapters_registry.errors import DecisionNotFound
from adapters_registry.models import DecisionRow, now
from adapters_registry.tensors import FloatArray


@dataclass(frozen=True, eq=False, kw_only=True)
class Decided:
    """A decision as it is kept.

    experts     who answered: {"expert", "id", "weight"} of each
    candidates  who was considered: {"expert", "score"} of the best
    router      the version of what the router had learned
    encoder     the id of what made the vector
    vector      (dim,) the prompt's embedding, in half precision; (0,) when there is none
    text        the prompt's routing text, None where texts are not kept
    score       from 0 (bad) to 1 (good), None: nobody has said
    """

    id: str
    at: datetime
    tenant: str | None
    method: str
    kind: str
    experts: Sequence[dict[str, Any]]
    candidates: Sequence[dict[str, Any]]
    confidence: float
    router: int
    encoder: str
    vector: FloatArray
    text: str | None = None
    score: float | None = None
    comment: str | None = None
    rated_at: datetime | None = None


class Decisions:
    """The decisions in the registry's database."""

    def __init__(self, engine: Engine, data_dir: Path) -> None:
        self._session = Changes(engine, data_dir).session

    def add(self, decisions: Sequence[Decided]) -> None:
        """Keep these, in one transaction."""
        with self._session() as session, session.begin():
            session.add_all(_row(each) for each in decisions)

    def get(self, decision: str, tenant: str | None = None) -> Decided:
        """One decision; the operator (None) may see all. Raises DecisionNotFound, also for another tenant's."""
        with self._session() as session:
            return _decided(_find(session, decision, tenant))

    def rate(self, decision: str, score: float, *, comment: str | None = None, tenant: str | None = None) -> Decided:
        """Say how good the answer was, from 0 to 1. Said again, the last word counts.

        Raises DecisionNotFound, also for another tenant's, and ValueError for what is no score.
        """
        if not 0 <= score <= 1:
            raise ValueError(f"A score is from 0 (bad) to 1 (good), not {score}.")
        with self._session() as session, session.begin():
            row = _find(session, decision, tenant)
            if (row.score, row.comment) != (score, comment):
                row.score, row.comment, row.rated_at = score, comment, now()
            return _decided(row)

    def rated(self) -> list[Decided]:
        """All that somebody has judged, the latest judgement last."""
        query = select(DecisionRow).where(DecisionRow.rated_at.is_not(None))
        with self._session() as session:
            rows = session.scalars(query.order_by(DecisionRow.rated_at, DecisionRow.number))
            return [_decided(row) for row in rows]

    def count(self) -> int:
        with self._session() as session:
            return session.scalar(select(func.count()).select_from(DecisionRow)) or 0

    def forget(self, keep: int, days: float) -> int:
        """Delete decisions older than `days`, and all but about the last `keep` of those nobody judged and of those
        that somebody did; returns how many."""
        oldest = now() - timedelta(days=days)
        number, unrated = DecisionRow.number, DecisionRow.rated_at.is_(None)
        with self._session() as session, session.begin():
            newest = session.scalar(select(func.max(number))) or 0
            last = select(number).where(~unrated).order_by(number.desc()).limit(1).offset(keep)
            gone = 0
            for which in (
                DecisionRow.at < oldest,
                unrated & (number <= newest - keep),
                ~unrated & (number <= last.scalar_subquery()),
            ):
                result = session.execute(delete(DecisionRow).where(which))
                assert isinstance(result, CursorResult)
                gone += result.rowcount
        return gone


def _find(session: Session, decision: str, tenant: str | None) -> DecisionRow:
    row = session.scalars(select(DecisionRow).where(DecisionRow.id == decision)).one_or_none()
    if row is None or (tenant is not None and row.tenant != tenant):
        raise DecisionNotFound(decision)
    return row


def _row(decided: Decided) -> DecisionRow:
    fields = {name: getattr(decided, name) for name in Decided.__dataclass_fields__}
    fields |= {"experts": list(decided.experts), "candidates": list(decided.candidates)}
    if decided.text is not None:
        fields["text"] = decided.text.replace("\0", " ")  # PostgreSQL cannot store it
    vector = np.asarray(decided.vector, "<f2")
    return DecisionRow(**{**fields, "vector": vector.tobytes()})


def _decided(row: DecisionRow) -> Decided:
    fields = {name: getattr(row, name) for name in Decided.__dataclass_fields__}
    return Decided(**{**fields, "vector": np.frombuffer(row.vector, "<f2").astype(np.float32)})
