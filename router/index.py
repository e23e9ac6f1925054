"""A faiss index of prototypes that is updated in place while others search it."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import faiss
import numpy as np
from numpy.typing import NDArray

from router.encoder import Vectors

Slots = NDArray[np.int64]


class PrototypeIndex:
    """Inner-product search over the vectors of keyed items (experts), several vectors to a key.

    A key lives in a *slot*, a small integer that is never given to another key. All vectors of a key are
    stored under its slot, so a search answers in slots and a mask over slots restricts it. (Ids repeat,
    hence faiss' IDMap: IDMap2 would add a reverse map that only `reconstruct` reads.)
    `factory` is a faiss factory string that needs no training and can remove: "Flat" is exact, "SQfp16"
    halves the memory. Every method takes the lock: a search is far shorter than the encoding before it.
    """

    def __init__(self, dim: int, factory: str = "Flat") -> None:
        self.dim = dim
        self._index = faiss.index_factory(dim, f"IDMap,{factory}", faiss.METRIC_INNER_PRODUCT)
        if not self._index.is_trained:
            raise ValueError(f"A {factory!r} index must be trained first. Use 'Flat' or 'SQfp16'.")
        self._slots: dict[str, int] = {}
        self._next = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """How many vectors there are."""
        return int(self._index.ntotal)

    def __contains__(self, key: str) -> bool:
        return key in self._slots

    @property
    def capacity(self) -> int:
        """One more than the largest slot given so far: the length of a mask."""
        return self._next

    def keys(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._slots)

    def slots(self, keys: Iterable[str]) -> Slots:
        """The slot of each key, (n,). Raises KeyError for one that is not there."""
        with self._lock:
            return np.array([self._slots[key] for key in keys], np.int64)

    def put(self, key: str, vectors: Vectors) -> int:
        """Add the vectors (n, dim) of a key, or replace those it has; returns its slot. n = 0 is fine."""
        rows = np.ascontiguousarray(vectors, np.float32).reshape(-1, self.dim)
        with self._lock:
            if (slot := self._slots.get(key)) is None:
                slot = self._slots[key] = self._next
                self._next += 1
            else:
                self._index.remove_ids(faiss.IDSelectorRange(slot, slot + 1))
            self._index.add_with_ids(rows, np.full(len(rows), slot, np.int64))
            return slot

    def remove(self, key: str) -> None:
        """Forget a key and its vectors; a key that is not there is fine."""
        with self._lock:
            if (slot := self._slots.pop(key, None)) is not None:
                self._index.remove_ids(faiss.IDSelectorRange(slot, slot + 1))

    def search(
        self, vector: NDArray[np.float32], m: int, among: NDArray[np.bool_] | None = None
    ) -> tuple[Slots, Vectors]:
        """The m vectors with the largest inner product: their slots and products, both (<= m,), best first.

        `among` (capacity,) is true for the slots to search; later slots are left out. None searches all.
        """
        query = np.ascontiguousarray(vector, np.float32).reshape(1, self.dim)
        with self._lock:
            m = min(m, len(self))
            if m < 1:
                return np.zeros(0, np.int64), np.zeros(0, np.float32)
            params: faiss.SearchParameters | None = None
            if among is not None:
                bits = np.packbits(among, bitorder="little")
                selector = faiss.IDSelectorBitmap(len(bits), faiss.swig_ptr(bits))  # length in bytes
                params = faiss.SearchParameters()
                params.sel = selector
            products, slots = self._index.search(query, m, params=params)
        found = slots[0] >= 0
        return slots[0][found], products[0][found]
