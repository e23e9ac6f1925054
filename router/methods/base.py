"""The base model for everything: the row that every other method is compared with."""

from __future__ import annotations

from typing import ClassVar, Self

import numpy as np

from router.library import Library
from router.method import Method, MethodSettings, Query, Scores
from router.taxonomy import Taxonomy


class Base(Method):
    """Considers no expert, so the decision is always to abstain."""

    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        expert_training="standard",
        expert_data="private",
        routing_data="none",
        input="task",
        depth="model",
        selection="sparse",
        aggregation="none",
        generalization="out-of-distribution",
        user_data="zero-shot",
    )
    encodes = False

    def __init__(self, size: int) -> None:
        self._size = size

    @classmethod
    def fit(cls, library: Library, settings: MethodSettings, previous: Self | None = None) -> Self:
        return cls(len(library))

    def score(self, query: Query) -> Scores:
        return np.full(self._size, -np.inf)
