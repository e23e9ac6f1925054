"""Mixtures: the best few experts of any scoring method, blended with constant weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from router.method import Choice, Method, MethodSettings, Query, Scores

#: LoRAuter's softmax is five times as flat as one of log-odds: 0.2 where 0.04 makes cosines of centroids log-odds.
SPREAD = 5.0


class MixtureSettings(MethodSettings):
    """top_k     experts that answer together; 1: the best alone
    alpha     None, or only so many of them that the right one is among them with probability 1 - alpha: what a
              calibration knows (`moerge router calibrate`); without one it changes nothing
    weights   softmax: softmax(score / spread) over them, LoRAuter's (2601.21795: k 3, T 0.2); uniform: equal ones,
              LoraRetriever's mixture (2402.09997)
    spread    the temperature T of that softmax, in the method's own units; None: five times that at which its
              scores are log-odds, which is LoRAuter's 0.2 where they are cosines of centroids
    grid      weights are rounded to multiples of this, so that decisions that are nearly equal share one blend
    operator  how the experts are merged, a name in `router.blending.OPERATORS`
    options   the operator's own settings ({} for the defaults)
    """

    top_k: int = Field(default=1, ge=1, le=64)
    alpha: float | None = Field(default=None, gt=0, lt=1)
    weights: Literal["softmax", "uniform"] = "softmax"
    spread: float | None = Field(default=None, gt=0)
    grid: float = Field(default=0.05, gt=0, le=0.5)
    operator: str = "cat"
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _operator_that_exists(self) -> Self:
        if self.top_k > 1:
            from router.blending.operators import operator_of  # it imports PyTorch

            operator_of(self.operator, self.options)
        return self


class Mixing(Method):
    """A method whose best experts answer together when its settings say so: those of the `top_k` that reach their own
    threshold, as the best has to. A `threshold` of -1 lets all of them join, as the papers have it.
    """

    settings: Any

    def choose(self, query: Query, scores: Scores, ranked: Sequence[int]) -> Choice:
        settings: MixtureSettings = self.settings
        own, most = self.thresholds, self.candidates(scores, settings.top_k, settings.alpha)
        members = [ranked[0], *(k for k in ranked[1:most] if own is None or scores[k] >= own[k])]
        shares = mixture_weights(scores[members], settings, SPREAD * self.temperature)  # (K,)
        kept = [(k, float(share)) for k, share in zip(members, shares, strict=True) if share > 0]
        if len(kept) == 1:
            return Choice([(kept[0][0], 1.0)])
        return Choice(kept, kind="blend", operator=settings.operator, operator_settings=settings.options)


def mixture_weights(scores: Scores, settings: MixtureSettings, spread: float) -> NDArray[np.float64]:
    """(K,) scores -> weights on the grid that add up to 1; the best expert is never rounded away.

    `spread` holds where the settings have none.
    """
    K = len(scores)
    if settings.weights == "uniform":
        return np.full(K, 1 / K, np.float64)
    shares = np.exp((scores - scores.max()) / (settings.spread or spread))
    return on_grid(shares / shares.sum(), settings.grid)


def on_grid(weights: NDArray[np.float64], grid: float) -> NDArray[np.float64]:
    """(K,) weights that add up to 1 -> multiples of 1/n that do, n = round(1 / grid), by largest remainders.

    Each moves by less than 1/n; ties go to the first.
    """
    n = round(1 / grid)
    exact = weights * n
    whole = np.floor(exact + 1e-9)
    order = np.argsort(-(exact - whole), kind="stable")
    whole[order[: n - int(whole.sum())]] += 1
    return whole / n
