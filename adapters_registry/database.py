"""Open the database, SQLite or PostgreSQL, at the newest schema."""

from __future__ import annotations

import fcntl
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError

from adapters_registry.errors import RegistryUnusable, StoreFull
from adapters_registry.store import refuse_when_full

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_MS = 30_000


def open_database(data_dir: Path, url: str | None = None) -> Engine:
    """Connect and migrate. Without `url`: SQLite in `data_dir`. Raises RegistryUnusable or StoreFull.

    Any number of processes may open the same database at once.
    """
    with refuse_when_full(data_dir):
        data_dir.mkdir(parents=True, exist_ok=True)
    engine = _engine(url or f"sqlite:///{data_dir / 'registry.db'}")
    try:
        with explained(data_dir), _alone(data_dir), engine.begin() as connection:
            migrate(connection)
    except CommandError as error:
        engine.dispose()
        raise RegistryUnusable(
            f"The database of {data_dir} was written by a newer release ({error}). Upgrade moerge, or use another "
            "data folder."
        ) from error
    except DBAPIError as error:
        engine.dispose()
        raise RegistryUnusable(f"Cannot open the registry's database: {error.orig}") from error
    except BaseException:
        engine.dispose()
        raise
    return engine


def migrate(connection: Connection, revision: str = "head") -> None:
    """Bring the schema to `revision`, within the connection's transaction."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


def _engine(url: str) -> Engine:
    try:
        engine = create_engine(url, pool_pre_ping=not url.startswith("sqlite"))
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise RegistryUnusable(
            f"Cannot use that database URL: {error}. SQLite is sqlite:///file.db, PostgreSQL is "
            "postgresql+psycopg://user:password@host/database with the extra moerge[postgres]."
        ) from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _configure_sqlite(connection: sqlite3.Connection, record: Any) -> None:
    # Python's sqlite3 opens transactions late and not at all around DDL; we say BEGIN ourselves.
    connection.isolation_level = None
    for pragma in (
        f"busy_timeout = {BUSY_MS}",  # first: switching to WAL waits for other openers too
        "journal_mode = WAL",
        "synchronous = FULL",  # what was committed survives a power cut, not only kill -9; writes are rare
        "foreign_keys = ON",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")


@contextmanager
def _alone(data_dir: Path) -> Iterator[None]:
    """One opener at a time migrates; the kernel releases the lock of one that dies."""
    with (data_dir / ".migrate.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def explained(where: Path) -> Iterator[None]:
    """The database's troubles as ours: a full disk (SQLite tells by message, PostgreSQL by SQLSTATE), or any other."""
    try:
        yield
    except OperationalError as error:
        if "database or disk is full" in str(error.orig) or getattr(error.orig, "sqlstate", None) == "53100":
            raise StoreFull(where) from error
        raise RegistryUnusable(f"The registry's database does not answer: {error.orig}") from error
