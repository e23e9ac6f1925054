"""What a prompt means and how it is written, together: LDA on the encoder's layers plus TF-IDF over n-grams."""

from __future__ import annotations

from typing import ClassVar, Self

import numpy as np
from pydantic import Field

from router.library import Library, sentence
from router.method import MethodSettings, Query, Scores, fitted
from router.methods.lda import LDA, LDASettings
from router.methods.lexical import Lexical, LexicalSettings
from router.methods.retrieval import centroid, own_threshold
from router.mixture import Mixing, MixtureSettings
from router.taxonomy import Reference, Taxonomy

FEW = 100  # differences of samples: of fewer, the LDA threshold says little
TEMPERATURE = 1.4  # measured on ni150 (docs/experiments.md)


class FusionSettings(MixtureSettings):
    """lexical    w, what a lexical cosine counts for beside a distance of LDA
    threshold  score under which the base model answers; None: each expert's own
    """

    lexical: float = Field(default=24.0, ge=0)
    threshold: float | None = None


class Fusion(Mixing):
    """s_k = LDA's score of expert k + w times the lexical one.

    Neither depends on which other experts the caller may use, so nothing is normalised for a prompt. LDA's score is
    measured by the usual scatter of samples, which makes libraries comparable: one w fits all.

    A library too small to tell from its own samples what is foreign to an expert leaves that to `retrieval`: an expert
    answers where the cosine with its centroid reaches retrieval's threshold.
    """

    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        expert_training="standard",
        expert_data="private",
        routing_data="expert",
        input="example",
        depth="model",
        selection="sparse",
        aggregation="none",
        generalization="in-distribution",
        user_data="zero-shot",
        reference=Reference(title="Sum rule (Kittler et al. 1998)", url="https://doi.org/10.1109/34.667881"),
    )
    Settings: ClassVar[type[MethodSettings]] = FusionSettings

    def __init__(self, library: Library, settings: FusionSettings, lda: LDA, lexical: Lexical) -> None:
        self.settings = settings
        self.lda, self.lexical = lda, lexical
        self.temperature = TEMPERATURE
        assert lda.thresholds is not None
        assert lexical.thresholds is not None
        self.thresholds = (lda.thresholds + settings.lexical * lexical.thresholds).round(6)
        if settings.threshold is not None:
            self.thresholds = np.full(len(library), settings.threshold)
        self._small = lda.scatter.freedom < FEW and settings.threshold is None
        if self._small:
            head = library.head or library.dim
            rows = [centroid(vectors) if len(vectors) else np.zeros((0, head)) for vectors in library.sentences]
            self._centroids = np.array([row[0] if len(row) else np.zeros(head) for row in rows]).reshape(-1, head)
            self._limits = self.thresholds  # a calibration moves its copy's thresholds, not these
            self._least = np.array([own_threshold(vectors, "centroid") for vectors in library.sentences])

    @classmethod
    def fit(cls, library: Library, settings: MethodSettings, previous: Self | None = None) -> Self:
        assert isinstance(settings, FusionSettings)
        lda = fitted(LDA, library, LDASettings(), previous.lda if previous else None)
        lexical = fitted(Lexical, library, LexicalSettings(), previous.lexical if previous else None)
        return cls(library, settings, lda, lexical)

    def score(self, query: Query) -> Scores:
        dense, lexical = self.lda.score(query), self.lexical.score(query)  # (n,) both
        scores: Scores = dense + self.settings.lexical * np.where(np.isfinite(lexical), lexical, 0)
        return (self._as_retrieval_accepts(query, scores) if self._small else scores).round(6)

    def _as_retrieval_accepts(self, query: Query, scores: Scores) -> Scores:
        """In the same order, all moved by one number so that the best answers if retrieval's threshold is reached."""
        near = self._centroids @ sentence(query.vector, self._centroids.shape[1]) >= self._least
        usable = np.flatnonzero(query.among & np.isfinite(scores))
        if not len(usable):
            return scores
        best = usable[scores[usable].argmax()]
        above = float(scores[best] - self._limits[best])
        moved: Scores = scores - (min(0.0, above) if near[best] else max(0.0, above + 1))
        return moved
