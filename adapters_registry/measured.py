"""What was measured of versions after their registration, and reports on them: JSON by key, that goes with its version.

It changes nothing that is served, so the generation stays where it is.
"""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from adapters_registry.changes import Changes
from adapters_registry.errors import VersionNotFound
from adapters_registry.expert import Expert
from adapters_registry.models import CheckRow, ExpertRow, GenerationRow, VersionRow

#: Bytes that one entry may take as JSON.
MOST_JSON = 4 * 2**20


class Measured:
    """The entries in the registry's database. Who may read them is the caller's to know."""

    def __init__(self, changes: Changes) -> None:
        self._changes = changes

    def get(self, expert: Expert, key: str) -> dict[str, Any] | None:
        """What is kept with this version, None when nothing is."""
        with self._changes.session() as session:
            number = _version(session, expert)
            row = None if number is None else session.get(CheckRow, (number, key))
            return None if row is None else row.data

    def put(self, expert: Expert, key: str, data: dict[str, Any]) -> None:
        """Keep this with a version in place of what is there; all of it or nothing.

        Raises VersionNotFound for one that was removed meanwhile, and ValueError for what cannot be stored.
        """
        if (size := len(json.dumps(data, allow_nan=False))) > MOST_JSON:
            raise ValueError(f"'{key}' takes {size:,} bytes as JSON, more than {MOST_JSON:,}.")
        with self._changes.session() as session, session.begin():
            session.execute(update(GenerationRow).values(value=GenerationRow.value))  # writers take turns
            if (number := _version(session, expert)) is None:
                raise VersionNotFound(expert.name, expert.version)
            session.merge(CheckRow(version_id=number, key=key, data=data))


def _version(session: Session, expert: Expert) -> int | None:
    """The row of this very content: a removed name's numbers may come to mean something else."""
    query = select(VersionRow.id).join(ExpertRow, VersionRow.expert_id == ExpertRow.id)
    wanted = (ExpertRow.name == expert.name, VersionRow.number == expert.version, VersionRow.digest == expert.digest)
    return session.scalars(query.where(*wanted)).one_or_none()
