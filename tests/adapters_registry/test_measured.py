"""What is kept of checks: with its version, whole, on each kind of database."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select

from adapters_registry.base import BaseSpec
from adapters_registry.errors import VersionNotFound
from adapters_registry.expert import Expert
from adapters_registry.models import CheckRow
from adapters_registry.registry import Registry

Register = Callable[..., Expert]

REPORT = {"sections": [{"name": "own_task", "figure": 0.5, "passed": None}], "generation": 3, "text": "schön"}


@pytest.fixture
def expert(registry: Registry, adapters: list[Path], register: Register) -> Expert:
    return register(registry, "a", adapters[0])


def test_what_is_kept_is_read_back_and_replaced_and_is_no_change(registry: Registry, expert: Expert) -> None:
    before = registry.generation()
    assert registry.measured.get(expert, "report") is None
    registry.measured.put(expert, "report", REPORT)
    assert registry.measured.get(expert, "report") == REPORT
    registry.measured.put(expert, "report", {"sections": []})
    assert registry.measured.get(expert, "report") == {"sections": []}
    assert registry.measured.get(expert, "other") is None
    assert registry.generation() == before


@pytest.mark.parametrize("version", [1, None])
def test_it_goes_with_its_version(
    registry: Registry, expert: Expert, adapters: list[Path], register: Register, version: int | None
) -> None:
    register(registry, "a", adapters[1], new_version=True)
    registry.measured.put(expert, "report", REPORT)
    registry.remove("a", version)
    with registry._changes.session() as session:
        assert session.scalar(select(func.count()).select_from(CheckRow)) == 0
    assert registry.measured.get(expert, "report") is None
    with pytest.raises(VersionNotFound):
        registry.measured.put(expert, "report", REPORT)


def test_another_content_under_the_same_name_and_number_has_none(
    registry: Registry, expert: Expert, adapters: list[Path], register: Register
) -> None:
    registry.remove("a")
    other = register(registry, "a", adapters[1])
    assert other.version == expert.version
    with pytest.raises(VersionNotFound):
        registry.measured.put(expert, "report", REPORT)
    assert registry.measured.get(other, "report") is None


def test_it_is_there_after_a_restart(
    tmp_path: Path, database_url: str | None, base: BaseSpec, adapters: list[Path], register: Register
) -> None:
    with Registry.open(tmp_path / "data", url=database_url, base=base) as registry:
        expert = register(registry, "a", adapters[0])
        registry.measured.put(expert, "report", REPORT)
    with Registry.open(tmp_path / "data", url=database_url, base=base) as registry:
        assert registry.measured.get(registry.get("a"), "report") == REPORT


@pytest.mark.parametrize(("data", "why"), [({"x": float("nan")}, "JSON"), ({"x": "y" * (5 * 2**20)}, "more than")])
def test_what_cannot_be_stored_is_refused(registry: Registry, expert: Expert, data: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        registry.measured.put(expert, "report", data)
    assert registry.measured.get(expert, "report") is None


def test_writers_take_turns(registry: Registry, expert: Expert) -> None:
    def write(n: int) -> None:
        registry.measured.put(expert, "report", {"a": n, "b": n})

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, range(12)))
    found = registry.measured.get(expert, "report")
    assert found is not None
    assert found["a"] == found["b"]


WRITER = """
import sys
from pathlib import Path
from adapters_registry.base import BaseSpec
from adapters_registry.registry import Registry
base = BaseSpec.from_pretrained(sys.argv[2], name="tiny", aliases={"org/tiny-llama"})
with Registry.open(Path(sys.argv[1]), base=base) as registry:
    expert, n = registry.get("a"), 0
    while True:
        n += 1
        registry.measured.put(expert, "report", {"first": n, "rows": [n] * 2000, "last": n})
        print(n, flush=True)
"""


def test_a_writer_that_is_killed_leaves_a_whole_report(
    tmp_path: Path, base: BaseSpec, base_folder: Path, adapters: list[Path], register: Register
) -> None:
    with Registry.open(tmp_path / "data", base=base) as registry:
        expert = register(registry, "a", adapters[0])
        command = [sys.executable, "-c", WRITER, str(tmp_path / "data"), str(base_folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "1\n"
            time.sleep(0.05)
            writer.send_signal(signal.SIGKILL)
        found = registry.measured.get(expert, "report")
        assert found is not None
        assert {found["first"], found["last"], *found["rows"]} == {found["first"]}


def test_what_spoke_against_a_promotion_is_in_its_event(registry: Registry, expert: Expert) -> None:
    registry.retire("a")
    registry.promote("a", 1, force=True, against=["too loud"])
    registry.retire("a")
    registry.promote("a", 1)
    found = [event.detail for event in registry.events("a") if event.action == "promote"]
    assert found == [{"forced": True, "against": ["too loud"]}, {}]
