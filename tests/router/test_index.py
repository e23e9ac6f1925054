from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from router.encoder import Vectors
from router.index import PrototypeIndex

DIM = 8


def unit(rng: np.random.Generator, n: int, dim: int = DIM) -> Vectors:
    vectors = rng.standard_normal((n, dim))
    rows: Vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return rows


def by_numpy(contents: dict[str, Vectors], query: NDArray[np.float32], m: int) -> list[tuple[str, float]]:
    """The slow twin: every product, sorted."""
    products = [(key, float(row @ query)) for key, rows in contents.items() for row in rows]
    return sorted(products, key=lambda item: -item[1])[:m]


def found(index: PrototypeIndex, query: NDArray[np.float32], m: int, among: list[str] | None = None) -> list[str]:
    keys = index.keys()
    names = dict(zip(index.slots(keys).tolist(), keys, strict=True))
    mask = None
    if among is not None:
        mask = np.zeros(index.capacity, bool)
        mask[index.slots(among)] = True
    return [names[slot] for slot in index.search(query, m, mask)[0]]


OPERATIONS = st.lists(
    st.tuples(st.sampled_from("abcdef"), st.sampled_from(["put", "remove"]), st.integers(0, 5)), max_size=12
)


@given(OPERATIONS, st.integers(1, 40), st.sets(st.sampled_from("abcdef")), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_search_agrees_with_numpy_whatever_was_put_replaced_and_removed(
    operations: list[tuple[str, str, int]], m: int, among: set[str], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    index, contents = PrototypeIndex(DIM), dict[str, Vectors]()
    for key, operation, n in operations:
        if operation == "put":
            contents[key] = unit(rng, n)
            index.put(key, contents[key])
        else:
            contents.pop(key, None)
            index.remove(key)
    query = unit(rng, 1)[0]
    assert set(index.keys()) == set(contents)
    assert len(index) == sum(map(len, contents.values()))

    expected = by_numpy(contents, query, m)
    np.testing.assert_allclose(index.search(query, m)[1], [product for _, product in expected], atol=1e-6)
    assert found(index, query, m) == [key for key, _ in expected]

    present = sorted(among & contents.keys())
    expected = by_numpy({key: contents[key] for key in present}, query, m)
    assert found(index, query, m, present) == [key for key, _ in expected]


def test_a_search_in_an_empty_index_finds_nothing() -> None:
    slots, products = PrototypeIndex(DIM).search(np.ones(DIM, np.float32), 5)
    assert len(slots) == len(products) == 0


def test_a_slot_is_never_given_to_another_key() -> None:
    index, rng = PrototypeIndex(DIM), np.random.default_rng(0)
    first = index.put("a", unit(rng, 2))
    assert index.put("a", unit(rng, 3)) == first
    index.remove("a")
    assert index.put("b", unit(rng, 1)) != first
    assert "a" not in index


def test_keys_added_after_a_mask_was_made_are_outside_it() -> None:
    index, rng = PrototypeIndex(DIM), np.random.default_rng(3)
    for before in range(1, 20):
        index.put(f"key {before}", unit(rng, 1))
        mask = np.ones(index.capacity, bool)
        later = [f"later {n}" for n in range(70)]
        for key in later:
            index.put(key, unit(rng, 1))
        slots, _ = index.search(unit(rng, 1)[0], 1000, mask)
        assert sorted(slots.tolist()) == [slot for slot in range(len(mask)) if mask[slot] and slot in live(index)]
        for key in later:
            index.remove(key)


def live(index: PrototypeIndex) -> set[int]:
    return set(index.slots(index.keys()).tolist())


def test_an_unknown_key_has_no_slot() -> None:
    with pytest.raises(KeyError):
        PrototypeIndex(DIM).slots(["nobody"])


def test_half_precision_finds_the_same_neighbours() -> None:
    rng = np.random.default_rng(1)
    exact, half = PrototypeIndex(64), PrototypeIndex(64, factory="SQfp16")
    for n in range(50):
        vectors = unit(rng, 4, 64)
        exact.put(str(n), vectors)
        half.put(str(n), vectors)
    half.remove("7")
    exact.remove("7")
    query = unit(rng, 1, 64)[0]
    assert found(half, query, 1) == found(exact, query, 1)
    np.testing.assert_allclose(half.search(query, 9)[1], exact.search(query, 9)[1], atol=2e-3)


def test_an_index_that_needs_training_is_refused() -> None:
    with pytest.raises(ValueError, match="Use 'Flat' or 'SQfp16'"):
        PrototypeIndex(DIM, factory="IVF4,Flat")


def test_searches_are_right_while_others_are_added_replaced_and_removed() -> None:
    rng = np.random.default_rng(2)
    index = PrototypeIndex(DIM)
    query = unit(rng, 1)[0]
    index.put("best", query[None])
    stop, errors = threading.Event(), list[str]()

    def read() -> None:
        while not stop.is_set():
            slots, products = index.search(query, 3)
            if slots[0] != 0 or abs(float(products[0]) - 1) > 1e-6:
                errors.append(f"{slots} {products}")

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for n in range(300):
        index.put(str(n % 20), -query[None] * np.ones((n % 5, 1), np.float32))
        index.remove(str((n + 7) % 20))
    stop.set()
    for reader in readers:
        reader.join()
    assert errors == []
