"""Confidence intervals by the bootstrap, of groups of prompts that belong together.

Prompts of one task share a template, so a router has most of them right or most of them wrong: they are not
independent, and resampling prompt by prompt would make intervals too narrow. Whole groups (tasks) are drawn with
replacement instead: the interval is for other tasks of this kind, not for other prompts of these tasks. With fewer
than `FEW` groups there is too little to draw from, and each prompt counts as its own group.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap  # type: ignore[import-untyped]

Rows = NDArray[np.int64]
Floats = NDArray[np.float64]
Statistic = Callable[..., float]  # rows of each population -> a figure

FEW = 10
RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A figure and the ends of its interval."""

    value: float
    low: float
    high: float

    def json(self) -> dict[str, float]:
        return asdict(self)


class Groups:
    """Rows 0 ... n-1 of a population, in the groups that are drawn as a whole."""

    def __init__(self, labels: Sequence[Hashable]) -> None:
        kinds = {label: number for number, label in enumerate(dict.fromkeys(labels))}
        self.alone = len(kinds) < FEW
        of = np.arange(len(labels)) if self.alone else np.array([kinds[label] for label in labels])
        self._rows = [np.flatnonzero(of == group) for group in range(of.max(initial=-1) + 1)]
        self.everything: Rows = np.arange(len(labels))

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, drawn: NDArray[np.int64]) -> Rows:
        return np.concatenate([self._rows[group] for group in drawn])


def estimate(
    statistic: Statistic,
    populations: Sequence[Groups],
    *,
    resamples: int = RESAMPLES,
    level: float = LEVEL,
    seed: int = 0,
) -> Estimate:
    """`statistic` of all rows, with its percentile interval; populations are drawn independently of each other.

    For a paired comparison give the difference of two figures on the same rows.
    """
    value = statistic(*(groups.everything for groups in populations))
    if any(len(groups) < 2 for groups in populations):
        return Estimate(value, value, value)
    low, high = np.percentile(
        _resampled(statistic, populations, resamples, seed), [50 - 50 * level, 50 + 50 * level]
    ).tolist()
    return Estimate(value, low, high)


@dataclass(frozen=True)
class Comparison:
    """The mean difference on the same prompts, its interval, and how likely one at least as far from 0 is by chance."""

    difference: Estimate
    p: float


def compare(
    ours: Floats, theirs: Floats, groups: Groups, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Comparison:
    """Two scores (n,) of the same prompts. p = P(|d* - d| >= |d|), d* the difference of a bootstrap sample."""
    gained = ours.astype(np.float64) - theirs
    means = _resampled(lambda rows: gained[rows].mean(), [groups], resamples, seed)
    d = float(gained.mean())
    low, high = np.percentile(means, [50 - 50 * level, 50 + 50 * level]).tolist()
    extreme = int((np.abs(means - d) >= abs(d) - 1e-12).sum())
    return Comparison(Estimate(d, low, high), (extreme + 1) / (resamples + 1))


def _resampled(statistic: Statistic, populations: Sequence[Groups], resamples: int, seed: int) -> Floats:
    """(resamples,) the statistic of groups drawn with replacement."""
    distribution: Floats = bootstrap(
        [np.arange(len(groups)) for groups in populations],
        lambda *drawn: statistic(*(groups.rows(each) for groups, each in zip(populations, drawn, strict=True))),
        n_resamples=resamples,
        method="percentile",
        vectorized=False,
        rng=np.random.default_rng(seed),
    ).bootstrap_distribution
    return distribution
