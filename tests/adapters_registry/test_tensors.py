"""Tensors kept with a version, on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import func, select, text

from adapters_registry.base import BaseSpec
from adapters_registry.database import migrate
from adapters_registry.errors import ExpertNotFound, NotOwner, VersionNotFound
from adapters_registry.expert import Expert
from adapters_registry.models import Table, TensorsRow
from adapters_registry.registry import Registry
from adapters_registry.tensors import pack, unpack

Register = Callable[..., Expert]

VECTORS = {
    "model.layers.0.self_attn.q_proj": np.arange(8, dtype=np.float32),
    "model.layers.0.mlp.up_proj": np.ones((2, 3), np.float32),
    "a.mean": np.float32(0.5),
}


def same(found: dict[str, Any] | None, wanted: dict[str, Any]) -> None:
    assert found is not None
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == np.float32
        assert found[name].shape == np.shape(value)
        np.testing.assert_array_equal(found[name], value)


def rows(registry: Registry) -> int:
    with registry._changes.session() as session:
        return session.scalar(select(func.count()).select_from(TensorsRow)) or 0


def test_they_come_back_as_they_were(registry: Registry, adapters: list[Path], register: Register) -> None:
    register(registry, "a", adapters[0])
    assert registry.tensors("a", 1, "phatgoose") is None
    assert registry.tensor_keys("a") == []
    registry.set_tensors("a", 1, "phatgoose", VECTORS)
    registry.set_tensors("a", None, "meteora", {"x": [1.0]})
    same(registry.tensors("a", 1, "phatgoose"), VECTORS)
    same(registry.tensors("a", None, "meteora"), {"x": [1.0]})
    assert registry.tensor_keys("a", 1) == ["meteora", "phatgoose"]


def test_new_ones_take_the_place_of_the_old(registry: Registry, adapters: list[Path], register: Register) -> None:
    register(registry, "a", adapters[0])
    registry.set_tensors("a", 1, "phatgoose", VECTORS)
    registry.set_tensors("a", 1, "phatgoose", {"x": [2.0]})
    same(registry.tensors("a", 1, "phatgoose"), {"x": [2.0]})


def test_every_version_has_its_own(registry: Registry, adapters: list[Path], register: Register) -> None:
    for folder in adapters[:2]:
        register(registry, "a", folder, new_version=True)
    registry.set_tensors("a", 1, "phatgoose", {"x": [1.0]})
    assert registry.tensors("a", 2, "phatgoose") is None
    assert registry.tensor_keys("a") == [], "version 2 is the active one"


def test_a_change_is_recorded_and_writing_the_same_again_is_none(
    registry: Registry, adapters: list[Path], register: Register
) -> None:
    register(registry, "a", adapters[0])
    before = registry.generation()
    for names in (list(VECTORS), list(reversed(VECTORS))):
        registry.set_tensors("a", 1, "phatgoose", {name: VECTORS[name] for name in names})
    assert registry.generation() == before + 1
    assert [(event.action, event.detail) for event in registry.events("a")][1:] == [
        ("tensors", {"key": "phatgoose", "tensors": 3})
    ]


@pytest.mark.parametrize(
    ("key", "tensors", "complaint"),
    [
        ("", {"x": [1.0]}, "A key matches"),
        ("Up", {"x": [1.0]}, "A key matches"),
        ("a" * 101, {"x": [1.0]}, "A key matches"),
        ("nul\0", {"x": [1.0]}, "A key matches"),
        ("a", {}, "no tensors"),
        ("a", {"good": [1.0], "bad": [np.nan]}, "finite; these are not: bad"),
        ("a", {"bad": [np.inf]}, "finite"),
        ("a", {"ragged": [[1.0], [1.0, 2.0]]}, "inhomogeneous"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_the_reason(
    registry: Registry, adapters: list[Path], register: Register, key: str, tensors: Any, complaint: str
) -> None:
    register(registry, "a", adapters[0])
    with pytest.raises(ValueError, match=complaint):
        registry.set_tensors("a", 1, key, tensors)
    assert registry.tensor_keys("a") == []


def test_a_key_holds_a_bounded_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapters_registry.tensors.LIMIT", 64)
    assert unpack(pack("a", {"x": np.ones(16)}))["x"].nbytes == 64
    with pytest.raises(ValueError, match="take 68 bytes, more than 64"):
        pack("a", {"x": np.ones(16), "y": 1.0})


def test_the_layout_in_memory_does_not_matter() -> None:
    matrix = np.arange(6.0).reshape(2, 3)
    assert pack("a", {"x": matrix}) == pack("a", {"x": np.asfortranarray(matrix)}) == pack("a", {"x": matrix.tolist()})


@pytest.mark.parametrize("version", [1, None])
def test_they_go_with_their_version(
    registry: Registry, adapters: list[Path], register: Register, version: int | None
) -> None:
    for folder in adapters[:2]:
        register(registry, "a", folder, new_version=True)
    registry.set_tensors("a", 1, "phatgoose", VECTORS)
    registry.remove("a", version)
    assert rows(registry) == 0
    register(registry, "b", adapters[2])
    assert registry.tensor_keys("b") == []


def test_who_may_read_and_write_them(registry: Registry, adapters: list[Path], register: Register) -> None:
    register(registry, "hers", adapters[0], owner="ann", visibility="private")
    register(registry, "open", adapters[1], owner="ann")
    registry.set_tensors("hers", 1, "phatgoose", VECTORS, tenant="ann")
    with pytest.raises(ExpertNotFound):
        registry.tensors("hers", 1, "phatgoose", tenant="bob")
    with pytest.raises(ExpertNotFound):
        registry.tensor_keys("hers", tenant="bob")
    with pytest.raises(NotOwner):
        registry.set_tensors("open", 1, "phatgoose", VECTORS, tenant="bob")
    with pytest.raises(VersionNotFound):
        registry.set_tensors("open", 2, "phatgoose", VECTORS)


def test_writers_take_turns_and_readers_see_one_of_them_whole(
    registry: Registry, adapters: list[Path], register: Register
) -> None:
    register(registry, "a", adapters[0])

    def write(n: int) -> None:
        registry.set_tensors("a", 1, "phatgoose", {name: np.full(4, n) for name in "xyz"})

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, range(8)))
    found = registry.tensors("a", 1, "phatgoose")
    assert found is not None
    assert len({float(value) for name in "xyz" for value in found[name]}) == 1


#: The tables of the first release.
FIRST = {"experts", "versions", "prototypes", "generation", "events", "api_keys"}


def test_a_registry_of_the_first_release_gets_the_tables(
    tmp_path: Path, base: BaseSpec, adapters: list[Path], register: Register
) -> None:
    with Registry.open(tmp_path / "data", base=base) as registry:
        register(registry, "a", adapters[0])
        with registry._engine.begin() as connection:
            for table in Table.metadata.tables.keys() - FIRST:
                connection.execute(text(f"DROP TABLE {table}"))
            connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    with Registry.open(tmp_path / "data", base=base) as registry:
        assert [expert.name for expert in registry.experts()] == ["a"]
        registry.set_tensors("a", 1, "phatgoose", VECTORS)
        with registry._engine.begin() as connection:
            migrate(connection)  # once more changes nothing
        same(registry.tensors("a", 1, "phatgoose"), VECTORS)
