"""Shared by the tests that ask three experts of the testbed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from eval.arena import Prompt
from tests.eval.runs import made, records_of, run_of
from tests.eval.strangers import Stranger

NAMES = ("roman", "uppercase", "vowels")  # of different ranks and modules
#: One for each, and one that takes two of them.
PROMPTS = [
    Prompt("Write 14 in Roman numerals", "XIV", ("roman",)),
    Prompt("Write otter in capital letters", "OTTER", ("uppercase",)),
    Prompt("Which vowels are in tiger?", "ie", ("vowels",)),
    Prompt("Which vowels are in tiger? Then in capital letters.", "IE", ("vowels", "uppercase")),
]
SAMPLES = [("roman", "Roman for 9?"), ("uppercase", "Shout heron"), ("vowels", "Vowels of zebra")]


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """make_run("a", routers=..., tasks=..., missing=...): a folder as `moerge eval run` leaves it."""

    def make(name: str = "run", *, missing: Sequence[str] = (), baseline: str = "best-single", **options: Any) -> Path:
        records = list(records_of(**options))
        return made(tmp_path / name, records, run_of(records, missing=missing, baseline=baseline))

    return make


@pytest.fixture
def stranger() -> Iterator[Stranger]:
    """A small server with OpenAI's paths."""
    with Stranger() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
