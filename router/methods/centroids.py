"""ARIADNE's retrieval: several centroids to an expert, so that one that does two things need not stand in between."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Self

import numpy as np
from pydantic import Field

from router.encoder import Vectors
from router.library import Library, sentence
from router.method import MethodSettings, Query, Scores
from router.methods.retrieval import centroid, cohesion
from router.mixture import Mixing, MixtureSettings
from router.taxonomy import FROM_SAMPLES, Reference, Taxonomy

# Measured with all-MiniLM-L6-v2 (docs/experiments.md): the threshold is offset + slope * cohesion.
OFFSET, SLOPE = 0.36, 0.15
TEMPERATURE = 0.04


class CentroidsSettings(MixtureSettings):
    """clusters   most centroids of one expert
    least      samples that a centroid stands for, on average: experts with few samples have fewer centroids
    threshold  score under which the base model answers; None: each expert's own, -1: never abstain
    """

    clusters: int = Field(default=3, ge=1, le=64)
    least: int = Field(default=5, ge=1)
    threshold: float | None = Field(default=None, ge=-1, le=1)


class Centroids(Mixing):
    """s_k = max_j q . c_kj over the centroids c_k1 ... c_km of expert k's samples, by spherical k-means."""

    taxonomy: ClassVar[Taxonomy] = replace(
        FROM_SAMPLES,
        reference=Reference(title="ARIADNE (2026)", url="https://arxiv.org/abs/2606.19079"),
    )
    Settings: ClassVar[type[MethodSettings]] = CentroidsSettings

    def __init__(self, library: Library, settings: CentroidsSettings, made: dict[str, tuple[Vectors, float]]) -> None:
        self.settings = settings
        self.made = made  # of each key: its centroids (m, dim) and its threshold
        groups = [made[key][0] for key in library.keys]
        self._rows = np.concatenate([np.zeros((0, library.head or library.dim), np.float32), *groups])  # (M, dim)
        self._expert = np.repeat(np.arange(len(library)), [len(group) for group in groups])  # (M,)
        self.thresholds = np.array([made[key][1] for key in library.keys], float)
        if settings.threshold is not None:
            self.thresholds = np.full(len(library), settings.threshold)
        self.temperature = TEMPERATURE

    @classmethod
    def fit(cls, library: Library, settings: MethodSettings, previous: Self | None = None) -> Self:
        """Clusters the samples of new and changed experts only."""
        assert isinstance(settings, CentroidsSettings)
        known = previous.made if previous else {}
        made = {
            key: known[key]
            if key in known
            else (spherical(vectors, count(vectors, settings)), OFFSET + SLOPE * cohesion(vectors, "centroid"))
            for key, vectors in zip(library.keys, library.sentences, strict=True)
        }
        return cls(library, settings, made)

    def score(self, query: Query) -> Scores:
        scores = np.full(len(query.among), -np.inf)
        np.maximum.at(scores, self._expert, self._rows @ sentence(query.vector, self._rows.shape[1]))
        return scores.round(6)  # so that equal samples tie


def count(vectors: Vectors, settings: CentroidsSettings) -> int:
    """Centroids for samples (n, d): n / least of them, between 1 and `clusters`."""
    return max(1, min(settings.clusters, len(vectors) // settings.least))


def spherical(vectors: Vectors, m: int) -> Vectors:
    """(n, d) unit rows -> at most m centroids (m, d) of length 1, by spherical k-means; the same every time.

    On the sphere |x - c|^2 = 2 - 2 x . c, so the nearest centroid by distance is the one by cosine, and k-means on
    unit rows differs only in its centroids' lengths, which do not matter for direction once they are scaled to 1.
    """
    distinct = len(np.unique(vectors, axis=0))
    if min(m, distinct) < 2:
        return centroid(vectors)
    # It takes a second to import, which servers without this method need not wait for.
    from sklearn.cluster import KMeans  # type: ignore[import-untyped]

    found = KMeans(min(m, distinct), n_init=4, random_state=0).fit(vectors.astype(np.float64))
    return np.concatenate([centroid(vectors[found.labels_ == c]) for c in range(found.n_clusters)])
