"""API keys, on both kinds of database."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import text

from adapters_registry.errors import KeyNotFound
from adapters_registry.keys import ApiKeys
from adapters_registry.registry import Registry


def test_a_key_is_verified_by_its_token_only(registry: Registry) -> None:
    info, token = registry.keys.create("ann", {"infer"})
    assert token.startswith(f"moe-{info.id}-")
    assert registry.keys.verify(token) == info
    assert (info.owner, info.scopes) == ("ann", frozenset({"infer"}))


@pytest.mark.parametrize(
    "change", [lambda t: t[:-1], lambda t: t + "x", lambda t: t.upper(), lambda t: "", lambda t: "ä" * 60]
)
def test_anything_else_is_no_key(registry: Registry, change: object) -> None:
    _, token = registry.keys.create("ann", {"infer"})
    assert callable(change)
    assert registry.keys.verify(change(token)) is None


def test_one_key_s_secret_does_not_open_another(registry: Registry) -> None:
    (one, first), (two, second) = registry.keys.create("ann", {"infer"}), registry.keys.create("bob", {"admin"})
    assert registry.keys.verify(first.replace(one.id, two.id)) is None
    assert registry.keys.verify(second.replace(two.id, "0" * 12)) is None


def test_the_secret_is_nowhere_in_the_database(registry: Registry) -> None:
    info, token = registry.keys.create("ann", {"infer", "admin"})
    secret = token.removeprefix(f"moe-{info.id}-")
    with registry._engine.connect() as connection:
        row = connection.execute(text("SELECT * FROM api_keys")).one()
    assert not any(secret in str(value) for value in row)
    assert secret not in repr(info)


def test_a_revoked_key_is_listed_and_refused(registry: Registry) -> None:
    info, token = registry.keys.create("ann", {"infer"})
    revoked = registry.keys.revoke(info.id)
    assert revoked.revoked_at is not None
    assert registry.keys.verify(token) is None
    assert registry.keys.list() == [revoked]
    assert registry.keys.revoke(info.id) == revoked, "again changes nothing"


def test_an_unknown_key_cannot_be_revoked(registry: Registry) -> None:
    with pytest.raises(KeyNotFound, match="No API key 'x'"):
        registry.keys.revoke("x")


def test_keys_are_made_without_a_base_model(tmp_path: Path, database_url: str | None) -> None:
    keys = ApiKeys.open(tmp_path / "data", database_url)
    _, token = keys.create("ann", {"admin"})
    keys.close()
    again = ApiKeys.open(tmp_path / "data", database_url)
    assert again.verify(token) is not None
    again.close()
