from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from eval.encodings import CHUNK, Remembering
from router.encoder import Vectors


class Counting:
    """The length of a text is its vector."""

    id, dim = "counting", 3

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, texts: Sequence[str]) -> Vectors:
        self.texts += texts
        return np.array([[len(text), 0, 1] for text in texts], np.float32)


@pytest.mark.parametrize("kept", [True, False])
def test_no_text_is_encoded_twice(kept: bool, tmp_path: Path) -> None:
    encoder = Counting()
    folder = tmp_path / "new" if kept else None
    remembering = Remembering(encoder, folder)
    for _ in range(2):
        np.testing.assert_array_equal(remembering.encode(["a", "bbb", "a"])[:, 0], [1, 3, 1])
    assert encoder.texts == ["a", "bbb"]
    assert Remembering(encoder, folder).encode(["bbb", "cc"]).tolist() == [[3, 0, 1], [2, 0, 1]]
    assert encoder.texts == (["a", "bbb", "cc"] if kept else ["a", "bbb", "bbb", "cc"])
    assert remembering.encode([]).shape == (0, 3)


def test_other_encoders_have_other_encodings(tmp_path: Path) -> None:
    Remembering(Counting(), tmp_path).encode(["a"])
    other = Counting()
    other.id = "another"
    Remembering(other, tmp_path).encode(["a"])
    assert other.texts == ["a"]


def test_fresh_means_encoded_again() -> None:
    encoder = Counting()
    remembering = Remembering(encoder)
    remembering.prepare(["a"])
    with remembering.fresh():
        remembering.encode(["a"])
    remembering.encode(["a"])
    assert encoder.texts == ["a", "a"]


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    texts = [str(n) for n in range(CHUNK + 1)]
    remembering = Remembering(Counting())
    remembering.prepare(texts, lambda done, total: told.append((done, total)))
    assert told == [(0, CHUNK + 1), (CHUNK, CHUNK + 1), (CHUNK + 1, CHUNK + 1)]
    remembering.prepare(texts, lambda done, total: told.append((done, total)))
    assert len(told) == 3


def test_the_oldest_go_when_there_are_too_many(tmp_path: Path) -> None:
    for text in "abcde":
        Remembering(Counting(), tmp_path, limit=3 * 4 * 3).encode([text])
    encoder = Counting()
    Remembering(encoder, tmp_path).encode(["a", "b", "c", "d", "e"])
    assert encoder.texts == ["a", "b"]


def test_a_file_that_is_no_database_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "encodings.sqlite"
    file.write_bytes(b"x" * 5000)
    for n in (1, 0):
        encoder = Counting()
        assert Remembering(encoder, tmp_path).encode(["a"]).tolist() == [[1, 0, 1]]
        assert len(encoder.texts) == n
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("UPDATE encodings SET vector = x'00'")
    encoder = Counting()
    assert Remembering(encoder, tmp_path).encode(["a"]).tolist() == [[1, 0, 1]]


def test_a_folder_that_cannot_be_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert Remembering(Counting(), tmp_path / "file").encode(["a"]).tolist() == [[1, 0, 1]]
