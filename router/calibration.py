"""What a calibration keeps, so that `confidence` is the probability of being right; `router.calibrating` makes it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from router.conformal import conformal_size, quantile, softmax


class Curve(BaseModel):
    """A curve through points (x, y), flat beyond them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    x: tuple[float, ...] = Field(min_length=1)
    y: tuple[float, ...] = Field(min_length=1)

    def at(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N,) -> (N,)."""
        return np.interp(x, self.x, self.y)


class Calibration(BaseModel):
    """settings       those of the method it was measured with; no others may use it
    encoder        the id of the encoder, likewise
    temperature    scores divided by it are log-odds
    shift          what is added to every expert's threshold
    answered       from softmax confidence to the probability of being right, when an expert answers
    abstained      the same when the base model does
    nonconformity  of held-out prompts' own experts, for candidate sets
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: str = ""
    encoder: str = ""
    temperature: float = Field(gt=0)
    shift: float = 0.0
    answered: Curve | None = None
    abstained: Curve | None = None
    nonconformity: tuple[float, ...] = ()

    def probability(self, confidence: float, answered: bool) -> float:
        """Of being right, given the confidence of a softmax."""
        curve = self.answered if answered else self.abstained
        return confidence if curve is None else float(curve.at(np.array([confidence]))[0])

    def size(self, scores: NDArray[np.float64], alpha: float) -> int:
        """Experts, the best first, among which the right one is with probability 1 - alpha; all, if too little is
        known to promise that. `scores` (n,), -inf for experts that are not considered.
        """
        limit = quantile(self.nonconformity, alpha)
        if not np.isfinite(limit):
            return len(scores)
        return conformal_size(softmax(scores, self.temperature), limit)
