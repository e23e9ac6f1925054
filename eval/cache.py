"""What a run has found out so far, on disk: answers, decisions and scores, so that nothing is asked twice.

A run that is killed goes on from here. Keys say what a value depends on, so that a changed question is another key.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Self

CACHE = "cache.sqlite"
DELAY = 1.0  # seconds that a value may wait to be written
CHUNK = 500  # keys in one query; SQLite takes 32,766 parameters, older ones 999

Notice = Callable[[str], None]


class CacheFailed(Exception):
    """The file cannot be written, and why."""


class Cache:
    """Keys (text) with JSON values, in one SQLite file; several threads may use it.

    Keys begin with what they are: `answer/...`, `decision/...`, `score/...`. What was `put` is there for `get_many` at
    once and on disk within a second, or after `flush`; a process that is killed loses that second. A file that is
    damaged is moved aside, which `notice` is told, and a new one begun. With None for a file, nothing outlives the
    process.
    """

    def __init__(self, file: Path | None, notice: Notice = lambda message: None) -> None:
        self._lock = threading.RLock()
        self._new: dict[str, str] = {}
        self._timer: threading.Timer | None = None
        self._failed: CacheFailed | None = None
        self._file = file
        try:
            self._database = _open(file, notice)
        except (OSError, sqlite3.Error) as error:
            raise CacheFailed(f"{file}: {error}. Is its folder there, and writeable?") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
        """The values of those keys that are known."""
        wanted = list(dict.fromkeys(keys))
        found: dict[str, str] = {}
        with self._lock:
            for start in range(0, len(wanted), CHUNK):
                chunk = wanted[start : start + CHUNK]
                marks = ",".join("?" * len(chunk))
                found |= self._database.execute(
                    f"SELECT key, value FROM known WHERE key IN ({marks})",  # noqa: S608 - question marks only
                    chunk,
                )
            found |= {key: self._new[key] for key in wanted if key in self._new}
        return {key: json.loads(value) for key, value in found.items()}

    def get(self, key: str) -> Any | None:
        return self.get_many((key,)).get(key)

    def put(self, key: str, value: Any) -> None:
        """Raises CacheFailed when an earlier value could not be written."""
        self.put_many({key: value})

    def put_many(self, values: Mapping[str, Any]) -> None:
        written = {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}
        with self._lock:
            if self._failed is not None:
                raise self._failed
            self._new |= written
            if self._timer is None and self._new:
                self._timer = threading.Timer(DELAY, self._late)
                self._timer.daemon = True
                self._timer.start()

    def flush(self) -> None:
        """Everything is on disk when this returns. Raises CacheFailed."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if not self._new:
                return
            try:
                with self._database:
                    self._database.executemany("INSERT OR REPLACE INTO known VALUES (?, ?)", self._new.items())
            except sqlite3.Error as error:
                self._failed = CacheFailed(f"{self._file}: {error}. Is there space left?")
                raise self._failed from error
            self._new.clear()

    def close(self) -> None:
        with self._lock:
            try:
                self.flush()
            finally:
                self._database.close()

    def _late(self) -> None:
        try:
            self.flush()
        except (CacheFailed, sqlite3.Error):  # whoever puts next is told
            return


def _open(file: Path | None, notice: Notice) -> sqlite3.Connection:
    if file is None:
        return _connect(":memory:")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        return _connect(str(file))
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        aside = _set_aside(file)
        notice(f"{file} is damaged ({error}): it is {aside.name} now, and what it held is found out anew.")
        return _connect(str(file))


def _connect(name: str) -> sqlite3.Connection:
    """Raises DatabaseError where the file is no database, or a damaged one."""
    database = sqlite3.connect(name, timeout=30, check_same_thread=False)
    try:
        database.execute("PRAGMA journal_mode = WAL")  # a kill leaves whole transactions
        database.execute("PRAGMA synchronous = NORMAL")
        with closing(database.execute("PRAGMA quick_check(1)")) as rows:
            if (told := rows.fetchone()[0]) != "ok":
                raise sqlite3.DatabaseError(told)
        database.execute("CREATE TABLE IF NOT EXISTS known (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
        database.execute("SELECT key, value FROM known LIMIT 1").fetchone()
    except BaseException:
        database.close()
        raise
    return database


def _set_aside(file: Path) -> Path:
    number = 1
    while (aside := file.with_name(f"{file.name}.damaged-{number}")).exists():
        number += 1
    file.replace(aside)
    for suffix in ("-wal", "-shm"):
        file.with_name(file.name + suffix).unlink(missing_ok=True)
    return aside
