"""Confidence intervals by the bootstrap, of groups of prompts that belong together.

Prompts of one task share a template, so a router has most of them right or most of them wrong: they are not
independent, and resampling prompt by prompt would make intervals too narrow. Whole groups (tasks) are drawn with
replacement instead: the interval is for other tasks of this kind, not for other prompts of these tasks. With fewer
than `FEW` groups there is too little to draw from, and each prompt counts as its own group.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
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

    For a paired comparison give the difference of two figures on the same rows; its p-value is `flipped`.
    """
    value = statistic(*(groups.everything for groups in populations))
    if any(len(groups) < 2 for groups in populations):
        return Estimate(value, value, value)
    low, high = np.percentile(
        _resampled(statistic, populations, resamples, seed), [50 - 50 * level, 50 + 50 * level]
    ).tolist()
    return Estimate(value, low, high)


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


FLIPS = 10_000
CHUNK = 4_000_000  # numbers of a matrix of draws that are held at once


class Draws:
    """The same bootstrap for many systems at once: how often each unit is drawn, (resamples, U) counts.

    Units are tasks. With fewer than `FEW` of them they are prompts, drawn anew within each task, whose tasks all stay:
    the interval is about other prompts of these tasks, then.

    of  (E,) the unit of each prompt; `tasks` (E,) its task, numbered from 0 without gaps
    """

    def __init__(self, tasks: Sequence[Hashable], *, resamples: int = RESAMPLES, seed: int = 0) -> None:
        kinds = {label: number for number, label in enumerate(dict.fromkeys(tasks))}
        self.tasks: Rows = np.array([kinds[label] for label in tasks], np.int64)
        self.count = len(kinds)
        self.by_task = self.count >= FEW
        self.of: Rows = self.tasks if self.by_task else np.arange(len(tasks))
        self.units = self.count if self.by_task else len(tasks)
        self._resamples, self._seed = resamples, seed
        self._whole: Floats | None = None  # all of them, if they fit into a chunk

    def members(self, task: int) -> Rows:
        return np.flatnonzero(self.tasks == task)

    def __iter__(self) -> Iterator[Floats]:
        """Counts (r, U), in chunks of rows that together are all resamples; the same every time."""
        if self._whole is not None:
            yield self._whole
            return
        rng = np.random.default_rng(self._seed)
        pools = [np.arange(self.units)] if self.by_task else [self.members(task) for task in range(self.count)]
        step = max(1, min(self._resamples, CHUNK // max(self.units, 1)))
        for start in range(0, self._resamples, step):
            rows = min(step, self._resamples - start)
            counts = np.zeros((rows, self.units))
            for pool in pools:
                drawn = rng.integers(0, len(pool), (rows, len(pool)))
                drawn += np.arange(rows)[:, None] * len(pool)
                counts[:, pool] = np.bincount(drawn.ravel(), minlength=rows * len(pool)).reshape(rows, -1)
            if step == self._resamples:
                self._whole = counts
            yield counts


def interval(distribution: Floats, level: float = LEVEL) -> tuple[Floats, Floats]:
    """(S,) ends of the percentile intervals of (resamples, S); resamples that say nothing (NaN) are left out."""
    ends = [50 - 50 * level, 50 + 50 * level]
    percentile = np.nanpercentile if np.isnan(distribution).any() else np.percentile
    silent = np.isnan(distribution).all(axis=0)
    low, high = percentile(np.where(silent, 0.0, distribution), ends, axis=0)
    return np.where(silent, np.nan, low), np.where(silent, np.nan, high)


def flipped(gained: Floats, *, flips: int = FLIPS, seed: int = 0) -> Floats:
    """(S,) p-values of sums over units of (U, S): by chance, would one be as far from 0?

    If two systems do equally well, their scores on a unit could change places, which flips the sign of what one gains
    on it: a paired permutation test. It is right for any number of units (all 2^U signs, if they fit into `flips`,
    else drawn ones), where a p-value from the bootstrap is too small for few units.
    """
    U = len(gained)
    rng = np.random.default_rng(seed)
    total = np.abs(gained.sum(axis=0))
    slack = 1e-9 * np.abs(gained).sum(axis=0)  # sums in another order
    if flips >= 2**U:
        signs = 1.0 - 2 * ((np.arange(2**U)[:, None] >> np.arange(U)) & 1)
        share: Floats = (np.abs(signs @ gained) >= total - slack).mean(axis=0)
        return share
    extreme = np.ones(gained.shape[1])  # the signs as they are
    step = max(1, CHUNK // max(U, 1))
    for start in range(0, flips, step):
        signs = 1.0 - 2 * rng.integers(0, 2, (min(step, flips - start), U))
        extreme += (np.abs(signs @ gained) >= total - slack).sum(axis=0)
    extreme /= flips + 1
    return extreme
