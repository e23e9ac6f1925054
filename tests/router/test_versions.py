from __future__ import annotations

import json
import multiprocessing
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from router.versions import (
    NOTHING,
    Learned,
    NoSuchVersion,
    NothingBefore,
    Rating,
    RouterVersions,
    VersionUnreadable,
)

GOOD = Rating(decision="dec-1", expert="a", score=1, text="spell it backwards")
PRAISED = Rating(decision="dec-2", expert="a", score=0.8)
NEUTRAL = Rating(decision="dec-3", expert="a", score=0.5)
BAD = Rating(decision="dec-4", expert="b", score=0)
ROWS = np.eye(4, 3, dtype=np.float32)


@pytest.fixture
def versions(tmp_path: Path) -> RouterVersions:
    return RouterVersions(tmp_path / "routers")


def save(versions: RouterVersions, note: str = "") -> Learned:
    return versions.save(note=note, ratings=[GOOD, PRAISED, NEUTRAL, BAD], vectors=ROWS, encoder="words@1")


def test_a_version_is_read_as_it_was_written(versions: RouterVersions) -> None:
    calibration = {"retrieval": {"temperature": 0.1 + 0.2, "shift": -1e-30, "map": [[0.5, 1.0]]}}
    saved = versions.save(
        note="bést",
        ratings=[GOOD],
        vectors=ROWS[:1],
        encoder="e",
        calibration=calibration,
        report={"rows": [1]},
    )
    read = versions.load(saved.number)
    assert read.content == saved.content
    assert read.calibration == calibration
    np.testing.assert_array_equal(read.vectors, ROWS[:1])


def test_what_was_learned_is_told_apart(versions: RouterVersions) -> None:
    learned = versions.load(save(versions).number)
    assert learned.extra == {"a": ["spell it backwards"]}
    np.testing.assert_array_equal(learned.praised("words@1")["a"], ROWS[1:2])
    assert {name: len(rows) for name, rows in learned.refused("words@1").items()} == {"b": 1}
    assert learned.praised("words@2") == {} == learned.refused("words@2"), "vectors of another encoder say nothing"


def test_nothing_is_in_force_before_a_version_is_promoted(versions: RouterVersions) -> None:
    assert versions.active().learned is NOTHING
    assert versions.numbers() == []
    save(versions)
    assert versions.active().learned is NOTHING
    versions.promote(1)
    assert versions.active().learned.number == 1


def test_versions_are_numbered_and_know_their_parent(versions: RouterVersions) -> None:
    first = save(versions)
    versions.promote(1)
    second = save(versions)
    assert (first.content.parent, second.content.parent) == (0, 1)
    assert versions.numbers() == [1, 2]


def test_rolling_back_goes_back_step_by_step(versions: RouterVersions) -> None:
    for number in (1, 2, 3):
        save(versions)
        versions.promote(number)
    assert [versions.rollback().number for _ in range(3)] == [2, 1, 0]
    with pytest.raises(NothingBefore, match="promote NUMBER"):
        versions.rollback()
    versions.promote(3)
    versions.promote(3)
    assert versions.rollback().number == 0, "promoting what is in force changes nothing"


def test_rolling_back_passes_over_what_cannot_be_read(versions: RouterVersions) -> None:
    for number in (1, 2, 3):
        save(versions)
        versions.promote(number)
    (versions.folder / "2.json").write_text("{")
    assert versions.rollback().number == 1


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "swapped", "not json", "no vectors", "other vectors"])
def test_a_damaged_version_is_passed_over_and_said(versions: RouterVersions, damage: str) -> None:
    for number in (1, 2):
        save(versions, note="good")
        versions.promote(number)
    file, vectors = versions.folder / "2.json", versions.folder / "2.safetensors"
    match damage:
        case "flipped":
            file.write_text(file.read_text().replace('"good"', '"evil"'))
        case "cut":
            file.write_bytes(file.read_bytes()[:-20])
        case "empty":
            file.write_bytes(b"")
        case "swapped":
            file.write_bytes((versions.folder / "1.json").read_bytes())
        case "not json":
            file.write_bytes(b"\xff\xfe\x00")
        case "no vectors":
            vectors.unlink()
        case "other vectors":
            vectors.write_bytes(vectors.read_bytes()[:-1] + b"\x01")
    with pytest.raises(VersionUnreadable, match="2"):
        versions.load(2)
    active = versions.active()
    assert active.learned.number == 1
    assert len(active.problems) == 1
    assert "cannot be used" in active.problems[0]
    assert "Version 1 is used instead." in active.problems[0]
    assert save(versions).number == 3, "its number is not given again"


def test_when_nothing_can_be_read_the_registry_alone_is_used(versions: RouterVersions) -> None:
    save(versions)
    versions.promote(1)
    (versions.folder / "1.json").unlink()
    active = versions.active()
    assert active.learned is NOTHING
    assert "No router version 1" in active.problems[0]
    (versions.folder / "active.json").write_text('["x"]')
    active = versions.active()
    assert active.learned is NOTHING
    assert "moerge router promote" in active.problems[0]
    save(versions)
    versions.promote(max(versions.numbers()))
    assert versions.active().problems == (), "promoting repairs it"


def test_promoting_what_is_not_there_or_not_whole_changes_nothing(versions: RouterVersions) -> None:
    save(versions)
    with pytest.raises(NoSuchVersion, match="There are: 1"):
        versions.promote(2)
    (versions.folder / "1.json").write_text("[]")
    with pytest.raises(VersionUnreadable):
        versions.promote(1)
    assert versions.active().learned is NOTHING


def test_the_stamp_changes_with_what_is_in_force_and_only_then(versions: RouterVersions) -> None:
    before = versions.stamp()
    save(versions)
    assert versions.stamp() == before
    versions.promote(1)
    promoted = versions.stamp()
    assert promoted != before
    versions.rollback()
    assert versions.stamp() != promoted


def test_ratings_need_a_finite_vector_each(versions: RouterVersions) -> None:
    with pytest.raises(ValueError, match="1 ratings need as many finite vectors"):
        versions.save(ratings=[GOOD], vectors=ROWS)
    with pytest.raises(ValueError, match="finite"):
        versions.save(ratings=[GOOD], vectors=np.full((1, 3), np.nan, np.float32))


def test_writers_do_not_take_each_others_numbers(versions: RouterVersions) -> None:
    with ThreadPoolExecutor(4) as pool:
        numbers = [learned.number for learned in pool.map(lambda _: save(versions), range(8))]
    assert sorted(numbers) == list(range(1, 9))
    assert all(versions.load(number).number == number for number in numbers)


def test_a_process_killed_between_writing_and_promoting_changes_nothing(versions: RouterVersions) -> None:
    save(versions)
    versions.promote(1)
    child = multiprocessing.get_context("spawn").Process(target=_save_and_die, args=(versions.folder,))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert versions.active().learned.number == 1
    assert versions.active().problems == ()
    assert versions.load(2).content.note == "last words", "what was written is whole"
    assert save(versions).number == 3, "its lock is free"
    assert not list(versions.folder.glob(".tmp*")), "and what it left half-written is cleared"


def _save_and_die(folder: Path) -> None:
    versions = RouterVersions(folder)
    save(versions, note="last words")
    (folder / ".tmp-half").write_text(json.dumps({"half": "written"})[:5])
    os.kill(os.getpid(), signal.SIGKILL)
