"""What a run has found out outlives a kill, and a damaged file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from eval.cache import Cache, CacheFailed

WRITER = """
import sys, time
from pathlib import Path
from eval.cache import Cache
cache = Cache(Path(sys.argv[1]))
for number in range(100_000):
    cache.put(f"answer/{number}", {"number": number})
    if number % 100 == 0:
        cache.flush()
        print(number, flush=True)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "new" / "cache.sqlite"


def test_what_was_put_is_there_at_once_and_in_the_next_process(file):
    with Cache(file) as cache:
        cache.put("answer/1", {"text": "ä", "n": None})
        assert cache.get_many(["answer/1", "answer/2"]) == {"answer/1": {"text": "ä", "n": None}}
        cache.put("answer/1", "another")
        assert cache.get("answer/1") == "another"
    with Cache(file) as cache:
        assert cache.get("answer/1") == "another"
        assert cache.get("answer/2") is None


def test_more_keys_than_one_query_takes(file):
    with Cache(file) as cache:
        cache.put_many({str(number): number for number in range(2000)})
        cache.flush()
        cache.put("2000", 2000)
        assert cache.get_many(map(str, range(3000))) == {str(number): number for number in range(2001)}


def test_a_value_reaches_the_disk_without_another_word(file):
    with Cache(file) as writer:
        writer.put("answer/1", 1)
        writer._timer.join()
        with Cache(file) as reader:
            assert reader.get("answer/1") == 1


def test_a_kill_loses_nothing_that_was_flushed(file):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(file)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    for _ in range(5):
        flushed = int(writer.stdout.readline())
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    told: list[str] = []
    with Cache(file, told.append) as cache:
        found = cache.get_many(f"answer/{number}" for number in range(flushed + 1))
    assert len(found) == flushed + 1
    assert not told


@pytest.mark.parametrize("content", [b"no database at all", b"SQLite format 3\0" + b"\7" * 5000])
def test_a_damaged_file_is_set_aside(file, content):
    file.parent.mkdir()
    file.write_bytes(content)
    told: list[str] = []
    with Cache(file, told.append) as cache:
        cache.put("answer/1", 1)
    assert "cache.sqlite.damaged-1" in told[0]
    assert (file.parent / "cache.sqlite.damaged-1").read_bytes() == content
    with Cache(file, told.append) as cache:
        assert cache.get("answer/1") == 1
    assert len(told) == 1


def test_a_file_damaged_in_its_middle_is_set_aside(file):
    with Cache(file) as cache:
        cache.put_many({f"answer/{number}": "x" * 500 for number in range(1000)})
    content = bytearray(file.read_bytes())
    content[4096 * 3 : 4096 * 40] = os.urandom(4096 * 37)
    file.write_bytes(content)
    told: list[str] = []
    with Cache(file, told.append) as cache:
        assert not cache.get_many(["answer/1"])
    assert told


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheFailed, match="file/cache"):
        Cache(tmp_path / "file" / "cache.sqlite")


def test_without_a_file_it_remembers_for_the_process():
    with Cache(None) as cache:
        cache.put("answer/1", 1)
        cache.flush()
        assert cache.get("answer/1") == 1
