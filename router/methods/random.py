"""One expert at random: what a router must beat."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import ClassVar, Self

import numpy as np

from router.library import Library
from router.method import Method, MethodSettings, Query, Scores
from router.taxonomy import FROM_SAMPLES, Taxonomy


class Random(Method):
    """The score is a hash of prompt and name, uniform in [0, 1): the same in every process, and an
    expert's score does not depend on which others there are."""

    taxonomy: ClassVar[Taxonomy] = replace(
        FROM_SAMPLES,
        routing_data="none",
    )
    encodes = False

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    @classmethod
    def fit(cls, library: Library, settings: MethodSettings, previous: Self | None = None) -> Self:
        return cls(tuple(expert.name for expert in library.experts))

    def score(self, query: Query) -> Scores:
        seed = hashlib.sha256(query.text.encode(errors="surrogatepass"))
        return np.array([_uniform(seed, name) for name in self._names])


def _uniform(seed: hashlib._Hash, name: str) -> float:
    digest = seed.copy()
    digest.update(b"\0" + name.encode())
    return int.from_bytes(digest.digest()[:6], "big") / 2**48
