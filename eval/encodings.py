"""Encodings kept on disk by content, so that measuring the same prompts again takes seconds."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import platformdirs

from router.encoder import Encoder, Vectors, head_of

CHUNK = 64
LIMIT = 512 * 2**20  # bytes of vectors on disk: 100,000 texts of all-MiniLM-L6-v2 with its layers


def default_folder() -> Path:
    return platformdirs.user_cache_path("moerge") / "encodings"


class Remembering:
    """An encoder that encodes no text twice: neither in this process nor, with a folder, on this machine.

    The oldest encodings go when there are more than `limit` bytes. A folder that cannot be written, or a file that
    is no database, is as good as none: what is encoded is right all the same.
    """

    def __init__(self, encoder: Encoder, folder: Path | None = None, limit: int = LIMIT) -> None:
        self._encoder = encoder
        self._known: dict[str, Vectors] = {}
        self._file = folder / "encodings.sqlite" if folder else None
        self._limit = limit
        self._fresh = False

    @property
    def id(self) -> str:
        return self._encoder.id

    @property
    def dim(self) -> int:
        return self._encoder.dim

    @property
    def head(self) -> int:
        return head_of(self._encoder)

    def encode(self, texts: Sequence[str]) -> Vectors:
        if self._fresh:
            return self._encoder.encode(texts)
        self.prepare(texts)
        return np.array([self._known[text] for text in texts], np.float32).reshape(len(texts), self.dim)

    @contextmanager
    def fresh(self) -> Iterator[None]:
        """Nothing is remembered meanwhile: for measuring how long encoding takes."""
        self._fresh = True
        try:
            yield
        finally:
            self._fresh = False

    def prepare(self, texts: Sequence[str], tell: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Encode these texts now; `tell` is told how many are done, of how many that were not known."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if not new:
            return
        self._load(new)
        new = [text for text in new if text not in self._known]
        for start in range(0, len(new), CHUNK):
            tell(start, len(new))
            chunk = new[start : start + CHUNK]
            self._known.update(zip(chunk, self._encoder.encode(chunk), strict=True))
            self._save(chunk)
        tell(len(new), len(new))

    def _key(self, text: str) -> bytes:
        return hashlib.sha256(f"{self.id}\0{text}".encode(errors="surrogatepass")).digest()

    def _load(self, texts: Sequence[str]) -> None:
        def load(database: sqlite3.Connection) -> None:
            for text in texts:
                row = database.execute("SELECT vector FROM encodings WHERE key = ?", (self._key(text),)).fetchone()
                if row and len(row[0]) == 4 * self.dim:
                    self._known[text] = np.frombuffer(row[0], np.float32)

        self._with_database(load)

    def _save(self, texts: Sequence[str]) -> None:
        rows = [(self._key(text), self._known[text].astype(np.float32).tobytes()) for text in texts]

        def save(database: sqlite3.Connection) -> None:
            database.executemany("INSERT OR REPLACE INTO encodings (key, vector) VALUES (?, ?)", rows)
            most = self._limit // (4 * self.dim)
            database.execute("DELETE FROM encodings WHERE rowid <= (SELECT MAX(rowid) FROM encodings) - ?", (most,))

        self._with_database(save)

    def _with_database(self, use: Callable[[sqlite3.Connection], None]) -> None:
        if self._file is None:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self._file, timeout=10)) as database, database:
                database.execute("CREATE TABLE IF NOT EXISTS encodings (key BLOB UNIQUE, vector BLOB)")
                use(database)
        except (OSError, sqlite3.OperationalError):
            self._file = None
        except sqlite3.DatabaseError:  # no database: begin a new one
            self._file.unlink(missing_ok=True)
