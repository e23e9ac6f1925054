"""What a prompt means and how it is written, together: LDA on the encoder's layers plus TF-IDF over n-grams."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Self

import numpy as np
from pydantic import Field

from router.library import Library
from router.method import MethodSettings, Query, Scores, fitted
from router.methods.lda import LDA, LDASettings
from router.methods.lexical import Lexical, LexicalSettings
from router.methods.retrieval import Retrieval, RetrievalSettings
from router.mixture import Mixing, MixtureSettings
from router.taxonomy import FROM_SAMPLES, Reference, Taxonomy

FEW = 100  # samples in all: of fewer, the thresholds say little
FOREIGN = 192  # samples that are asked of all experts but their own
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

    An expert answers from the score on that nearly all of its own held-out samples reach. Experts that are far apart
    should also answer what is asked in other words than their samples, so below that score, down to the one that the
    nearest expert typically has for a sample that is not its own, `retrieval` decides. The expert answers where the
    cosine with its centroid reaches retrieval's threshold. In a library that is too small to tell what is foreign to an
    expert, retrieval decides at any score.
    """

    taxonomy: ClassVar[Taxonomy] = replace(
        FROM_SAMPLES,
        reference=Reference(title="Sum rule (Kittler et al. 1998)", url="https://doi.org/10.1109/34.667881"),
    )
    Settings: ClassVar[type[MethodSettings]] = FusionSettings

    def __init__(
        self, library: Library, settings: FusionSettings, lda: LDA, lexical: Lexical, retrieval: Retrieval
    ) -> None:
        self.settings = settings
        self.lda, self.lexical, self.retrieval = lda, lexical, retrieval
        self.temperature = TEMPERATURE
        assert lda.thresholds is not None
        assert lexical.thresholds is not None
        self.thresholds = (lda.thresholds + settings.lexical * lexical.thresholds).round(6)
        if settings.threshold is not None:
            self.thresholds = np.full(len(library), settings.threshold)
        self._limits = self.thresholds  # a calibration moves its copy's thresholds, not these
        self._doubt = (0.0, 0.0)  # scores above the threshold, from and to, for which retrieval decides
        if settings.threshold is None:
            few = sum(map(len, library.prototypes)) < FEW
            self._doubt = (-np.inf, np.inf) if few else (self._foreign(library), 0.0)

    @classmethod
    def fit(cls, library: Library, settings: MethodSettings, previous: Self | None = None) -> Self:
        assert isinstance(settings, FusionSettings)
        lda = fitted(LDA, library, LDASettings(), previous.lda if previous else None)
        lexical = fitted(Lexical, library, LexicalSettings(), previous.lexical if previous else None)
        retrieval = fitted(Retrieval, library, RetrievalSettings(), previous.retrieval if previous else None)
        return cls(library, settings, lda, lexical, retrieval)

    def score(self, query: Query) -> Scores:
        scores = self._sum(query)
        usable = np.flatnonzero(query.among & np.isfinite(scores))
        return (self._settled(query, scores, usable[scores[usable].argmax()]) if len(usable) else scores).round(6)

    def _sum(self, query: Query) -> Scores:
        dense, lexical = self.lda.score(query), self.lexical.score(query)  # (n,) both
        scores: Scores = dense + self.settings.lexical * np.where(np.isfinite(lexical), lexical, 0)
        return scores

    def _foreign(self, library: Library) -> float:
        """By how much the nearest expert but its own exceeds its threshold for a sample: the median."""
        samples = [
            (k, text, vector)
            for k, (texts, vectors) in enumerate(zip(library.texts, library.prototypes, strict=True))
            for text, vector in zip(texts, vectors, strict=False)  # embeddings of praised prompts have no texts
        ]
        above = []
        for k, text, vector in samples[:: -(-len(samples) // FOREIGN)]:
            scores = self._sum(Query(text, vector, np.ones(len(library), bool))) - self._limits
            above.append(np.delete(scores, k).max(initial=-np.inf))
        return float(np.median([each for each in above if np.isfinite(each)] or [0.0]))

    def _settled(self, query: Query, scores: Scores, best: int) -> Scores:
        """In the same order, all moved by one number where retrieval decides whether the best answers."""
        above = float(scores[best] - self._limits[best])
        least, most = self._doubt
        if not least <= above < most:
            return scores
        assert self.retrieval.thresholds is not None
        near = self.retrieval.score(query)[best] >= self.retrieval.thresholds[best]
        moved: Scores = scores - (min(0.0, above) if near else max(0.0, above + 1))
        return moved
