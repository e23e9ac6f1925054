"""Shared by the tests of routing methods: experts that are given by their samples' embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from adapters_registry.expert import Expert
from router.encoder import Vectors
from router.library import Library, build
from router.method import Query

MakeExpert = Callable[..., Expert]
DIM = 5


def unit(rows: Vectors) -> Vectors:
    """(n, d) -> the same directions, of length 1."""
    scaled: Vectors = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return scaled


def groups_of(sizes: Sequence[int], seed: int = 0) -> dict[str, Vectors]:
    """Experts whose samples lie around a direction of their own, farther along the last axis than along the others."""
    rng = np.random.default_rng(seed)
    spread = np.array([0.1, 0.1, 0.2, 0.2, 0.9])
    around = [(rng.standard_normal(DIM) * 2, rng.standard_normal((n, DIM)) * spread) for n in sizes]
    return {f"e{k}": unit(middle + rows) for k, (middle, rows) in enumerate(around)}


def library_of(make_expert: MakeExpert, prototypes: dict[str, Vectors], dim: int = DIM) -> Library:
    """Experts by name, each with the embeddings of its samples (n, dim)."""
    experts = [make_expert(name, "a sample") for name in prototypes]
    stored = {expert.id: prototypes[expert.name] for expert in experts}
    return build(experts, lambda texts: np.zeros((0, dim), np.float32), dim, stored=stored)


def ask(library: Library, vector: Vectors) -> Query:
    """A prompt that every expert may answer."""
    return Query("text", vector, np.ones(len(library), bool))
