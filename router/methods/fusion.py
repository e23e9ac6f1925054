"""What a prompt means and how it is written, together: LDA on the encoder's layers plus TF-IDF over n-grams."""

from __future__ import annotations

from typing import ClassVar, Self

import numpy as np
from pydantic import Field

from router.library import Library
from router.method import MethodSettings, Query, Scores, fitted
from router.methods.lda import LDA, LDASettings
from router.methods.lexical import Lexical, LexicalSettings
from router.mixture import Mixing, MixtureSettings
from router.taxonomy import Reference, Taxonomy

TEMPERATURE = 0.7  # measured on ni150 (docs/experiments.md)


class FusionSettings(MixtureSettings):
    """lexical    w, what a lexical cosine counts for beside a distance of LDA
    threshold  score under which the base model answers; None: each expert's own
    """

    lexical: float = Field(default=16.0, ge=0)
    threshold: float | None = None


class Fusion(Mixing):
    """s_k = LDA's score of expert k + w times the lexical one.

    Neither depends on which other experts the caller may use, so nothing is normalised for a prompt. LDA's score is
    measured by the usual scatter of samples, which makes libraries comparable: one w fits all.
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
        self.thresholds = lda.thresholds + settings.lexical * lexical.thresholds
        if settings.threshold is not None:
            self.thresholds = np.full(len(library), settings.threshold)

    @classmethod
    def fit(cls, library: Library, settings: MethodSettings, previous: Self | None = None) -> Self:
        assert isinstance(settings, FusionSettings)
        lda = fitted(LDA, library, LDASettings(), previous.lda if previous else None)
        lexical = fitted(Lexical, library, LexicalSettings(), previous.lexical if previous else None)
        return cls(library, settings, lda, lexical)

    def score(self, query: Query) -> Scores:
        dense, lexical = self.lda.score(query), self.lexical.score(query)  # (n,) both
        scores: Scores = dense + self.settings.lexical * np.where(np.isfinite(lexical), lexical, 0)
        return scores.round(6)
