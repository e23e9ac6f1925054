"""The schema and its migrations."""

from __future__ import annotations

from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import event, text

from adapters_registry.base import BaseSpec
from adapters_registry.database import open_database
from adapters_registry.errors import RegistryUnusable, StoreFull
from adapters_registry.expert import State
from adapters_registry.models import Table
from adapters_registry.proposal import FolderSource, Proposal
from adapters_registry.registry import Registry


def test_the_migrations_make_the_tables_of_the_models(tmp_path: Path, database_url: str | None) -> None:
    engine = open_database(tmp_path, database_url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Table.metadata) == []
    engine.dispose()


def test_a_database_of_a_newer_release_is_left_alone(tmp_path: Path, database_url: str | None) -> None:
    engine = open_database(tmp_path, database_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(RegistryUnusable, match="written by a newer release"):
        open_database(tmp_path, database_url)


def test_at_most_one_version_is_active_whatever_the_code_does(tmp_path: Path, database_url: str | None) -> None:
    engine = open_database(tmp_path, database_url)
    columns = "expert_id, number, digest, state, activated, base_model, rank, target_modules, source, description, tags, training_data, samples, checks, reasons, created_at"  # noqa: E501
    values = "1, {}, 'd', 'active', 1, 'b', 1, '[]', 's', '', '[]', '[]', '[]', '[]', '[]', '2026-01-01 00:00:00'"
    with engine.connect() as connection:
        connection.execute(
            text("INSERT INTO experts (id, name, visibility, last_version) VALUES (1, 'a', 'public', 2)")
        )
        connection.execute(text(f"INSERT INTO versions ({columns}) VALUES ({values.format(1)})"))
        with pytest.raises(Exception, match=r"one_active_version|UNIQUE constraint failed: versions\.expert_id"):
            connection.execute(text(f"INSERT INTO versions ({columns}) VALUES ({values.format(2)})"))
    engine.dispose()


def test_sqlite_is_set_up_to_lose_nothing(tmp_path: Path) -> None:
    engine = open_database(tmp_path)
    with engine.connect() as connection:
        pragmas = {
            name: connection.execute(text(f"PRAGMA {name}")).scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    engine.dispose()
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


def test_a_full_disk_is_reported_and_nothing_is_half_registered(
    tmp_path: Path, base: BaseSpec, adapters: list[Path]
) -> None:
    with Registry.open(tmp_path / "data", base=base) as registry:
        proposal = Proposal(name="a", source=FolderSource(path=adapters[0]), description="x" * 9000)

        @event.listens_for(registry._engine, "connect")
        def shrink(connection: object, record: object) -> None:
            connection.execute("PRAGMA max_page_count = 1")  # type: ignore[attr-defined]

        registry._engine.dispose()
        with pytest.raises(StoreFull), registry.prepare(proposal) as prepared:
            registry.commit(prepared, state=State.ACTIVE, prototypes={"minilm": [[1.0] * 100_000]})
        assert registry.experts() == []
        assert registry.store.digests() == []


@pytest.mark.parametrize(
    "url", ["nonsense", "mysteryql://host/db", "postgresql+psycopg://nobody@127.0.0.1:9/none?connect_timeout=2"]
)
def test_a_database_that_cannot_be_used_says_so(tmp_path: Path, url: str) -> None:
    with pytest.raises(RegistryUnusable, match=r"Cannot use that database URL|database does not answer"):
        open_database(tmp_path, url)


def test_a_database_that_stops_answering_is_named(tmp_path: Path, base: BaseSpec) -> None:
    with Registry.open(tmp_path / "data", base=base) as registry:
        registry._engine.dispose()
        (tmp_path / "data" / "registry.db").rename(tmp_path / "gone")
        (tmp_path / "data" / "registry.db").mkdir()
        for call in (registry.generation, registry.experts, registry.keys.list):
            with pytest.raises(RegistryUnusable, match="does not answer"):
                call()


def test_a_file_that_is_not_a_database_says_so(tmp_path: Path) -> None:
    (tmp_path / "registry.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(RegistryUnusable, match="not a database"):
        open_database(tmp_path)


def test_the_password_is_not_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(RegistryUnusable) as error:
        open_database(tmp_path, "postgresql+psycopg://me:hunter2@127.0.0.1:9/none?connect_timeout=2")
    assert "hunter2" not in str(error.value)
