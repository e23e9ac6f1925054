"""TF-IDF over hashed n-grams: what an expert's samples say, word by word, and how they are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from router.features import BUCKETS, FAMILIES, WIDTH, Weights, grams
from router.library import Library
from router.method import MethodSettings, Query, Scores
from router.mixture import Mixing, MixtureSettings
from router.taxonomy import FROM_SAMPLES, Reference, Taxonomy
from router.text import BUDGET, shorten

SLOPE = 0.6  # of the cosine that an expert's own prompts are expected to have, what the threshold asks for
LONE = 0.3  # that cosine for an expert with one sample
TEMPERATURE = 0.03


class LexicalSettings(MixtureSettings):
    """threshold  score under which the base model answers; None: each expert's own"""

    threshold: float | None = Field(default=None, ge=-1, le=1)


@dataclass(frozen=True, eq=False, slots=True)
class Profile:
    """An expert's samples: n texts with n-gram weights u_j (`router.features`), families of length 1.

    buckets   (b,) that occur in any of them
    mean      (b,) mean of u_j
    spread    (b,) share of the texts they occur in
    cohesion  (families,) |mean| of each family
    """

    buckets: NDArray[np.int64]
    mean: Weights
    spread: Weights
    cohesion: Weights
    n: int


class Lexical(Mixing):
    """s_k = cosine of a prompt's n-gram weights and expert k's mean weights, both times the idf of the n-gram,

        idf = 1 + log((1 + n) / (1 + df)),    df = sum_k share of expert k's texts that have it

    over three families of n-grams, each of length 1 in a prompt and of length |mean u_j| in an expert: the families in
    which an expert's samples are alike count for more. Like Rocchio's classifier, but that idf counts experts, so an
    expert with many samples does not make its own words common. Nothing grows with the number of samples.
    """

    taxonomy: ClassVar[Taxonomy] = replace(
        FROM_SAMPLES,
        reference=Reference(
            title="TF-IDF (Salton and Buckley 1988)", url="https://doi.org/10.1016/0306-4573(88)90021-0"
        ),
    )
    Settings: ClassVar[type[MethodSettings]] = LexicalSettings
    encodes = False

    def __init__(self, library: Library, settings: LexicalSettings, profiles: dict[str, Profile]) -> None:
        from scipy import sparse  # type: ignore[import-untyped]

        self.settings = settings
        self.profiles = profiles  # by key
        self.temperature = TEMPERATURE
        mine = [profiles[key] for key in library.keys]
        df = np.zeros(WIDTH)
        for each in mine:
            df[each.buckets] += each.spread
        self._idf = (1 + np.log((1 + len(mine)) / (1 + df))).astype(np.float32)  # (WIDTH,)
        weights = [weighted(each, self._idf) for each in mine]
        data = np.concatenate([np.zeros(0, np.float32), *weights])
        ends = np.concatenate([[0], np.cumsum([len(each) for each in weights], dtype=np.int64)])
        buckets = np.concatenate([np.zeros(0, np.int64), *(each.buckets for each in mine)])
        # (n, WIDTH), by column: of each n-gram, the experts that have it.
        rows = sparse.csr_array((data, buckets.astype(np.int32), ends.astype(np.int32)), shape=(len(mine), WIDTH))
        self._postings = rows.tocsc()
        self._known = np.array([each.n > 0 for each in mine], bool)
        own = np.array([expected(each) for each in mine])
        self.thresholds = SLOPE * own if settings.threshold is None else np.full(len(mine), settings.threshold)

    @classmethod
    def fit(cls, library: Library, settings: MethodSettings, previous: Self | None = None) -> Self:
        """Reads the samples of new and changed experts only."""
        assert isinstance(settings, LexicalSettings)
        known = previous.profiles if previous else {}
        pairs = zip(library.keys, library.texts, strict=True)
        return cls(library, settings, {key: known[key] if key in known else profile(texts) for key, texts in pairs})

    def score(self, query: Query) -> Scores:
        found = grams(query.text)
        weights = found.weights * self._idf[found.buckets]
        weights /= np.maximum(lengths(found.buckets, weights), 1e-9)[found.buckets // BUCKETS] * len(FAMILIES) ** 0.5
        scores = columns(self._postings, found.buckets, weights)
        return np.where(self._known, scores, -np.inf).round(6)


def columns(matrix: Any, which: NDArray[np.int64], weights: Weights) -> Scores:
    """(n,): `which` columns (b,) of a CSC matrix (n, N), weighted and summed, several times as fast as SciPy's."""
    starts = matrix.indptr[which]
    counts = matrix.indptr[which + 1] - starts
    ends = np.cumsum(counts)
    at = np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + counts, counts)
    values = matrix.data[at] * np.repeat(weights, counts)
    return np.bincount(matrix.indices[at], values, matrix.shape[0]).astype(np.float64)


def profile(texts: Sequence[str]) -> Profile:
    each = [grams(shorten(text.strip(), BUDGET)) for text in texts]
    buckets = np.concatenate([np.zeros(0, np.int64), *(found.buckets for found in each)])
    weights = np.concatenate([np.zeros(0, np.float32), *(found.weights for found in each)])
    distinct, at, counts = np.unique(buckets, return_inverse=True, return_counts=True)
    n = max(len(texts), 1)
    mean = (np.bincount(at, weights, len(distinct)) / n).astype(np.float32)
    spread = (counts / n).astype(np.float32)
    return Profile(distinct.astype(np.int32), mean, spread, lengths(distinct, mean), len(texts))


def lengths(buckets: NDArray[np.int64], weights: Weights) -> Weights:
    """(families,) the length of each family's weights (b,)."""
    return np.sqrt(np.bincount(buckets // BUCKETS, weights.astype(np.float64) ** 2, len(FAMILIES))).astype(np.float32)


def weighted(each: Profile, idf: Weights) -> Weights:
    """(b,) an expert's row: mean times idf, its families of length `cohesion`, all of it of length 1."""
    row = each.mean * idf[each.buckets]
    scale = each.cohesion / np.maximum(lengths(each.buckets, row), 1e-9) / max(np.linalg.norm(each.cohesion), 1e-9)
    return np.asarray(row * scale[each.buckets // BUCKETS], np.float32)


def expected(each: Profile) -> float:
    """The cosine of an own prompt, were all n-grams equally rare.

    With r the mean cosine of two samples, |mean|^2 = 1/n + r (n - 1)/n, and another sample's cosine with the mean is
    r / |mean|.
    """
    if each.n < 2:
        return LONE
    square = float((each.cohesion.astype(np.float64) ** 2).mean())
    r = (each.n * square - 1) / (each.n - 1)
    return float(max(r, 0.0) / max(square, 1e-12) ** 0.5)
