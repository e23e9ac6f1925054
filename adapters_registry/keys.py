"""API keys, `moe-<id>-<secret>`: who may call, and what for.

Only the secret's sha256 is kept. A slow password hash would add nothing: the secret is 256 random bits, so there is
no dictionary to try, and a key is checked with every request.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Iterable
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Literal, Self

from sqlalchemy import Engine, select

from adapters_registry.changes import Changes
from adapters_registry.database import open_database
from adapters_registry.errors import KeyNotFound
from adapters_registry.expert import Frozen
from adapters_registry.models import KeyRow, now

Scope = Literal["infer", "admin"]

_TOKEN = re.compile(r"moe-([0-9a-f]{12})-([A-Za-z0-9_-]{43})")
_NOBODY = "0" * 64  # compared with when there is no such key, so that both cases take the same time


class KeyInfo(Frozen):
    """A key without its secret."""

    id: str
    owner: str
    scopes: frozenset[Scope]
    created_at: datetime
    revoked_at: datetime | None = None


class ApiKeys:
    """The keys in the registry's database."""

    def __init__(self, engine: Engine, data_dir: Path) -> None:
        self._engine = engine
        self._session = Changes(engine, data_dir).session

    @classmethod
    def open(cls, data_dir: Path, url: str | None = None) -> Self:
        """For the command line, which needs no base model to hand out keys."""
        return cls(open_database(data_dir, url), data_dir)

    def close(self) -> None:
        self._engine.dispose()

    def create(self, owner: str, scopes: Iterable[Scope]) -> tuple[KeyInfo, str]:
        """A new key and its token, which cannot be shown again."""
        secret = secrets.token_urlsafe(32)
        row = KeyRow(
            id=secrets.token_hex(6),
            owner=owner,
            scopes=sorted(set(scopes)),
            sha256=_hash(secret),
            created_at=now(),
        )
        with self._session() as session, session.begin():
            session.add(row)
            session.flush()
            return _info(row), f"moe-{row.id}-{secret}"

    def verify(self, token: str) -> KeyInfo | None:
        """The key that this token is, or None when it is none, or revoked. Takes the same time either way."""
        match = _TOKEN.fullmatch(token)
        key_id, secret = match.groups() if match else ("", "")
        with self._session() as session:
            row = session.get(KeyRow, key_id)
        right = hmac.compare_digest(_hash(secret), row.sha256 if row else _NOBODY)
        return _info(row) if row and right and row.revoked_at is None else None

    def list(self) -> list[KeyInfo]:
        """All keys, the revoked ones too, oldest first."""
        with self._session() as session:
            return [_info(row) for row in session.scalars(select(KeyRow).order_by(KeyRow.created_at, KeyRow.id))]

    def revoke(self, key_id: str) -> KeyInfo:
        """Takes effect with the next request. Raises KeyNotFound."""
        with self._session() as session, session.begin():
            row = session.get(KeyRow, key_id)
            if row is None:
                raise KeyNotFound(key_id)
            row.revoked_at = row.revoked_at or now()
            return _info(row)


def _hash(secret: str) -> str:
    return sha256(secret.encode()).hexdigest()


def _info(row: KeyRow) -> KeyInfo:
    return KeyInfo.model_validate(
        {
            "id": row.id,
            "owner": row.owner,
            "scopes": row.scopes,
            "created_at": row.created_at,
            "revoked_at": row.revoked_at,
        }
    )
