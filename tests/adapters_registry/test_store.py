"""Whole or not at all: the store under good and bad circumstances."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from adapters_registry.errors import StoreFull
from adapters_registry.store import Staged, Store, content_digest

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
configs = st.dictionaries(st.text(max_size=4), json_values, max_size=3)


def fill(staged: Staged, config: object = None, weights: bytes = b"weights", card: bytes | None = None) -> None:
    staged.add("adapter_config.json", io.BytesIO(json.dumps(config or {}).encode()))
    staged.add("adapter_model.safetensors", io.BytesIO(weights))
    if card is not None:
        staged.add("README.md", io.BytesIO(card))


def put(store: Store, **content: Any) -> str:
    with store.stage() as staged:
        fill(staged, **content)
        staged.publish()
        return staged.digest


def never(digest: str) -> bool:
    return False


def leftovers(store: Store) -> list[str]:
    return [*store.digests(), *(each.name for each in (store.root / ".staging").iterdir())]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "adapters")


@settings(max_examples=50, deadline=None)
@given(configs, st.binary(max_size=8), configs, st.binary(max_size=8))
def test_digests_are_equal_exactly_when_contents_are(
    one: dict[str, Any], weights: bytes, two: dict[str, Any], other: bytes
) -> None:
    def address(config: dict[str, Any], weights: bytes, **style: Any) -> str:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "adapter_config.json").write_text(json.dumps(config, **style))
            (Path(folder) / "adapter_model.safetensors").write_bytes(weights)
            return content_digest(Path(folder))

    same = json.dumps(one, sort_keys=True) == json.dumps(two, sort_keys=True) and weights == other
    assert (address(one, weights) == address(two, other)) is same
    shuffled = dict(reversed(one.items()))
    assert address(one, weights) == address(shuffled, weights, indent=3), "spelling does not matter"


def test_what_is_stored_comes_back_read_only(store: Store) -> None:
    digest = put(store, config={"r": 1}, weights=b"\0" * 3_000_000, card=b"# Card")
    folder = store.path(digest)
    assert (folder / "adapter_model.safetensors").read_bytes() == b"\0" * 3_000_000
    assert store.digests() == [digest] == [content_digest(folder)]
    assert not any(each.stat().st_mode & 0o222 for each in [folder, *folder.iterdir()])
    assert leftovers(store) == [digest]


def test_the_card_is_not_part_of_the_content(store: Store) -> None:
    assert put(store, card=b"one") == put(store, card=b"two")
    assert (store.path(store.digests()[0]) / "README.md").read_bytes() == b"one"


def test_an_abandoned_stage_leaves_nothing(store: Store) -> None:
    with store.stage() as staged:
        fill(staged)
    assert leftovers(store) == []


def test_the_collector_spares_what_is_referenced_or_in_the_making(store: Store) -> None:
    kept, dropped = put(store, weights=b"kept"), put(store, weights=b"dropped")
    with store.stage() as staged:
        fill(staged, weights=b"new")
        assert store.collect({kept}.__contains__) == [dropped]
        assert staged.path.is_dir()
        staged.publish()
        assert store.collect({kept}.__contains__) == []
    assert store.collect({kept}.__contains__) == [staged.digest]
    assert store.digests() == [kept]


def test_a_stage_can_outlive_its_block(store: Store) -> None:
    with store.stage() as staged:
        fill(staged)
        staged.publish()
        staged.outlive()
    assert store.collect(never) == []
    staged.close()
    assert store.collect(never) == [staged.digest]


def test_adopting_content_that_is_there_protects_it(store: Store) -> None:
    digest = put(store)
    with store.stage() as staged:
        fill(staged)
        staged.publish()
        assert staged.path == store.path(digest)
        assert store.collect(never) == []
    assert store.collect(never) == [digest]


def test_what_a_killed_process_left_is_collected(store: Store) -> None:
    (store.root / ".staging" / "dead").mkdir()
    (store.root / ".staging" / "dead" / "adapter_config.json").write_text("{")
    shutil.copytree(store.path(put(store)), store.root / ("f" * 64))
    assert "f" * 64 in store.collect(never)
    assert leftovers(store) == []


def test_asking_and_deleting_is_one_step(store: Store) -> None:
    """A version that is committed while the collector is at it is seen, for the collector asks under its lock."""
    digest = put(store)
    with store.stage() as staged:
        fill(staged)
        staged.publish()  # holds the lock; the collector cannot even ask
        asked: list[str] = []

        def ask(each: str) -> bool:
            asked.append(each)
            return False

        assert store.discard(digest, ask) is False
        assert asked == []


def test_many_threads_storing_and_collecting_never_see_half_an_adapter(store: Store) -> None:
    content = bytes(range(256)) * 500

    def store_one(number: int) -> None:
        with store.stage() as staged:
            fill(staged, weights=content + bytes([number % 3]))
            staged.publish()
            assert content_digest(staged.path) == staged.digest
            store.collect(never)
            assert content_digest(staged.path) == staged.digest

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(store_one, range(60)))
    store.collect(never)
    assert leftovers(store) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("where", ["shutil.copyfileobj", "os.fsync", "pathlib.Path.rename", "pathlib.Path.mkdir"])
def test_a_full_disk_leaves_nothing(store: Store, monkeypatch: pytest.MonkeyPatch, where: str, number: int) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        with pytest.raises(StoreFull, match="No space left"):
            put(store)
    assert leftovers(store) == []
    assert store.digests() == [] != [put(store)], "and works again when there is space"


def test_a_really_full_disk_leaves_nothing(store: Store) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StoreFull):
            put(store, weights=b"x" * 200_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert leftovers(store) == []


def test_other_errors_stay_what_they_are(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise PermissionError(errno.EACCES, "no")

    monkeypatch.setattr("shutil.copyfileobj", fail)
    with pytest.raises(PermissionError):
        put(store)
    assert leftovers(store) == []


class StoreMachine(RuleBasedStateMachine):
    """Any order of staging, publishing, committing, forgetting and collecting agrees with a set of names."""

    stages = Bundle("stages")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.store = Store(Path(self.folder.name))
        self.committed: set[str] = set()
        self.held: dict[str, int] = {}

    @rule(target=stages, weights=st.integers(0, 3))
    def stage(self, weights: int) -> Any:
        staged = self.store.stage()
        fill(staged, weights=bytes([weights]))
        staged.publish()
        self.held[staged.digest] = self.held.get(staged.digest, 0) + 1
        return multiple(staged)

    @rule(staged=stages, commit=st.booleans())
    def finish(self, staged: Staged, commit: bool) -> None:
        if staged._lock is None:
            return
        if commit:
            self.committed.add(staged.digest)
        staged.close()
        self.held[staged.digest] -= 1

    @rule(weights=st.integers(0, 3))
    def forget(self, weights: int) -> None:
        self.committed = {each for each in self.committed if self.weights(each) != bytes([weights])}

    @rule()
    def collect(self) -> None:
        self.store.collect(self.committed.__contains__)
        assert set(self.store.digests()) == self.committed | {each for each, count in self.held.items() if count}

    @invariant()
    def what_is_needed_is_there_and_whole(self) -> None:
        for digest in self.committed | {each for each, count in self.held.items() if count}:
            assert content_digest(self.store.path(digest)) == digest

    def weights(self, digest: str) -> bytes:
        return (self.store.path(digest) / "adapter_model.safetensors").read_bytes()

    def teardown(self) -> None:
        self.folder.cleanup()


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)
