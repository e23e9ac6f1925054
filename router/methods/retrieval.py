"""LoraRetriever's selection: the expert whose registration samples are most like the prompt."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from router.encoder import Vectors
from router.index import PrototypeIndex
from router.library import Library, sentence
from router.method import MethodSettings, Query, Scores
from router.mixture import Mixing, MixtureSettings
from router.taxonomy import FROM_SAMPLES, Reference, Taxonomy

Scoring = Literal["centroid", "best", "vote"]

# Measured with all-MiniLM-L6-v2 (docs/experiments.md). A scoring's threshold is offset + slope * cohesion.
THRESHOLDS: dict[Scoring, tuple[float, float]] = {
    "centroid": (0.18, 0.30),
    "best": (0.25, 0.25),
    "vote": (0.05, 0.0),
}
TEMPERATURES: dict[Scoring, float] = {"centroid": 0.04, "best": 0.04, "vote": 0.05}
LONE_COHESION = 0.3  # of an expert with one sample, or nothing but a description

# How many of the nearest prototypes are looked at; experts behind them are not scored.
REACH = 2048


class ScoringSettings(MethodSettings):
    """scoring    centroid: cosine with the mean of the expert's samples; best: with its nearest sample;
                  vote: mean cosine over the `k` nearest samples of all experts, others counting 0
    k          samples that vote
    threshold  score under which the base model answers; None: each expert's own, -1: never abstain
    """

    scoring: Scoring = "centroid"
    k: int = Field(default=20, ge=1, le=REACH)
    threshold: float | None = Field(default=None, ge=-1, le=1)


class RetrievalSettings(ScoringSettings, MixtureSettings):
    """How experts are scored, and how the best of them answer together."""


class Retrieval(Mixing):
    """With q the prompt's unit embedding, and e_k1 ... e_kn those of expert k's samples,

    centroid  s_k = q . c_k,  c_k = sum_j e_kj / |sum_j e_kj|
    best      s_k = max_j q . e_kj
    vote      s_k = 1/m sum of q . e_kj over those e_kj among the m samples nearest to q
    """

    taxonomy: ClassVar[Taxonomy] = replace(
        FROM_SAMPLES,
        reference=Reference(title="LoraRetriever (Zhao et al. 2024)", url="https://arxiv.org/abs/2402.09997"),
    )
    Settings: ClassVar[type[MethodSettings]] = RetrievalSettings

    def __init__(
        self, library: Library, settings: RetrievalSettings, index: PrototypeIndex, own: dict[str, float]
    ) -> None:
        self.index = index  # holds these experts' keys, and others'
        self.own = own  # threshold of each key
        self.settings = settings
        self.thresholds = np.array([own[key] for key in library.keys], float)
        if settings.threshold is not None:
            self.thresholds = np.full(len(library), settings.threshold)
        self.temperature = TEMPERATURES[settings.scoring]
        self._slots = index.slots(library.keys)  # (n,) slot of expert k
        self._expert = np.full(index.capacity, -1)  # (capacity,) expert of a slot
        self._expert[self._slots] = np.arange(len(library))

    @classmethod
    def fit(cls, library: Library, settings: MethodSettings, previous: Self | None = None) -> Self:
        """Updates the previous method's index in place.

        The previous method still serves, with a mask over its own slots: new vectors are invisible to it,
        and what it still needs stays until the next fit.
        """
        assert isinstance(settings, RetrievalSettings)
        index = previous.index if previous else PrototypeIndex(library.head or library.dim)
        known = previous.own if previous else {}
        for key in set(index.keys()) - set(known) - set(library.keys):
            index.remove(key)
        own = {}
        for key, vectors in zip(library.keys, library.sentences, strict=True):
            if key not in index:
                index.put(key, centroid(vectors) if settings.scoring == "centroid" else vectors)
            own[key] = known[key] if key in known else own_threshold(vectors, settings.scoring)
        return cls(library, settings, index, own)

    def score(self, query: Query) -> Scores:
        among = np.zeros(len(self._expert), bool)
        among[self._slots[query.among]] = True
        m = self.settings.k if self.settings.scoring == "vote" else REACH
        slots, cosines = self.index.search(sentence(query.vector, self.index.dim), m, among)  # (m,) both, best first
        experts = self._expert[slots]
        scores = np.full(len(self._slots), -np.inf)
        if self.settings.scoring == "vote":
            scores[experts] = 0
            np.add.at(scores, experts, cosines / max(len(cosines), 1))
        else:
            np.maximum.at(scores, experts, cosines)
        return scores.round(6)  # so that equal samples tie, wherever faiss keeps them


def own_threshold(vectors: Vectors, scoring: Scoring) -> float:
    """The score under which an expert with these samples (n, d) does not answer.

    The more alike its samples are, the more alike they want a prompt to be.
    """
    offset, slope = THRESHOLDS[scoring]
    return offset + slope * cohesion(vectors, scoring)


def cohesion(vectors: Vectors, scoring: Scoring) -> float:
    """How an expert's samples (n, d) score when each is held out in turn and the others stand for it: the mean."""
    if len(vectors) < 2:
        return LONE_COHESION
    E = vectors.astype(np.float64)
    if scoring == "best":
        cosines = E @ E.T  # (n, n)
        np.fill_diagonal(cosines, -1.0)
        return float(cosines.max(axis=1).mean())
    rest = E.sum(axis=0) - E  # (n, d) the sum of the others
    lengths = np.linalg.norm(rest, axis=1)
    return float(((E * rest).sum(axis=1) / np.maximum(lengths, 1e-6)).mean())


def centroid(vectors: Vectors) -> Vectors:
    """(n, d) -> (1, d): the mean direction, of length 1; (0, d) if there is none."""
    total = vectors.sum(axis=0, keepdims=True, dtype=np.float64)  # (1, d)
    length = np.linalg.norm(total)
    unit: Vectors = (total / length if length > 1e-6 else total[:0]).astype(np.float32)
    return unit
