"""Nearest neighbours: the samples nearest to the prompt vote, the nearer the more."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Self

import numpy as np
from pydantic import Field

from router.library import Library, sentence
from router.method import MethodSettings, Query, Scores
from router.methods.retrieval import cohesion
from router.mixture import Mixing, MixtureSettings
from router.taxonomy import FROM_SAMPLES, Reference, Taxonomy

# Measured with all-MiniLM-L6-v2 (docs/experiments.md): the threshold is offset + slope * cohesion.
OFFSET, SLOPE = 0.20, 0.25
TEMPERATURE = 0.04


class KNNSettings(MixtureSettings):
    """neighbours  samples that vote
    bandwidth   a sample's vote is exp(cosine / bandwidth): near 0 the nearest decides, large ones are counted
    threshold   score under which the base model answers; None: each expert's own
    """

    neighbours: int = Field(default=20, ge=1)
    bandwidth: float = Field(default=0.05, gt=0)
    threshold: float | None = None


class KNN(Mixing):
    """s_k = b log( 1/K sum_j exp(q . e_kj / b) ) over those of expert k's samples that are among the K nearest.

    A kernel density with the cosine's scale: ranking by it is a distance-weighted vote, while its height still says
    how near the samples are, which the share of votes does not.
    """

    taxonomy: ClassVar[Taxonomy] = replace(
        FROM_SAMPLES,
        reference=Reference(
            title="Distance-weighted k-nearest neighbours (Dudani 1976)",
            url="https://doi.org/10.1109/TSMC.1976.5408784",
        ),
    )
    Settings: ClassVar[type[MethodSettings]] = KNNSettings

    def __init__(self, library: Library, settings: KNNSettings, own: dict[str, float]) -> None:
        self.settings = settings
        self.own = own  # threshold of each key
        self._rows = np.concatenate(
            [np.zeros((0, library.head or library.dim), np.float32), *library.sentences]
        )  # (N, dim)
        self._expert = np.repeat(np.arange(len(library)), [len(group) for group in library.sentences])  # (N,)
        self.thresholds = np.array([own[key] for key in library.keys], float)
        if settings.threshold is not None:
            self.thresholds = np.full(len(library), settings.threshold)
        self.temperature = TEMPERATURE

    @classmethod
    def fit(cls, library: Library, settings: MethodSettings, previous: Self | None = None) -> Self:
        assert isinstance(settings, KNNSettings)
        known = previous.own if previous else {}
        own = {
            key: known[key] if key in known else OFFSET + SLOPE * cohesion(vectors, "best")
            for key, vectors in zip(library.keys, library.sentences, strict=True)
        }
        return cls(library, settings, own)

    def score(self, query: Query) -> Scores:
        allowed = np.flatnonzero(query.among[self._expert])
        vector = sentence(query.vector, self._rows.shape[1])
        cosines = self._rows[allowed] @ vector if len(allowed) < len(self._rows) else self._rows @ vector
        K, b = self.settings.neighbours, self.settings.bandwidth
        nearest = np.argsort(-cosines.round(6), kind="stable")[:K]
        votes = np.zeros(len(query.among))
        top = float(cosines[nearest[0]]) if len(nearest) else 0.0
        np.add.at(votes, self._expert[allowed[nearest]], np.exp((cosines[nearest].astype(float) - top) / b))
        with np.errstate(divide="ignore"):  # log 0 is -inf: experts without a vote are not considered
            scores: Scores = top + b * np.log(votes / K)
        return scores.round(6)  # so that equal samples tie
