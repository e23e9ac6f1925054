"""Transactions on the registry's database: reads, and changes that take turns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, update
from sqlalchemy.orm import Session

from adapters_registry.database import explained
from adapters_registry.expert import State
from adapters_registry.models import EventRow, GenerationRow, VersionRow


@dataclass
class Change:
    """A transaction that changes something, the generation it makes, and who asked for it."""

    session: Session
    generation: int
    actor: str | None
    recorded: bool = False

    def record(self, action: str, name: str, version: int | None = None, **detail: Any) -> None:
        row = EventRow(
            generation=self.generation,
            actor=self.actor,
            action=action,
            expert=name,
            version=version,
            detail=detail,
        )
        self.session.add(row)
        self.recorded = True

    def enter(self, version: VersionRow, state: State) -> None:
        """Move a version to a state; the active one makes room first, for the index allows only one."""
        if state is State.ACTIVE:
            for row in version.expert.versions:
                if row.state == State.ACTIVE:
                    row.state = State.RETIRED
            self.session.flush()
            version.activated = self.generation
        version.state = state


class Changes:
    """What the registry and its collaborators read and change the database through."""

    def __init__(self, engine: Engine, data_dir: Path) -> None:
        self._engine = engine
        self._data_dir = data_dir

    @contextmanager
    def session(self) -> Iterator[Session]:
        with explained(self._data_dir), Session(self._engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def change(self, actor: str | None) -> Iterator[Change]:
        """One change. Incrementing the counter first makes writers take turns, on SQLite and PostgreSQL alike.

        When nothing is recorded, nothing has changed, and the counter stays where it was.
        """
        increment = update(GenerationRow).values(value=GenerationRow.value + 1).returning(GenerationRow.value)
        with self.session() as session, session.begin() as transaction:
            change = Change(session, session.scalars(increment).one(), actor)
            yield change
            if not change.recorded:
                transaction.rollback()
