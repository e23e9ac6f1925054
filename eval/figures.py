"""Figures of many routers on the same prompts, with intervals: sums over units (tasks, or prompts), drawn together.

E prompts, S systems, U units, T tasks, R resamples. A figure is given prompt by prompt as what is above and below the
line of a fraction, (E, S) each; 0 / 0 where a system has nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.intervals import CHUNK, Draws, Estimate, Floats, Rows, interval

DIGITS = 10


@dataclass(frozen=True)
class Parts:
    above: Floats
    below: Floats

    @classmethod
    def of(cls, values: Floats) -> Parts:
        """A mean of values (E, S), of those that are there (not NaN)."""
        there = ~np.isnan(values)
        return cls(np.where(there, values, 0.0), there.astype(np.float64))

    def sums(self, units: Rows, count: int) -> tuple[Floats, Floats]:
        """(U, S) each."""
        return _summed(self.above, units, count), _summed(self.below, units, count)

    @property
    def total(self) -> Floats:
        """(S,) over all prompts at once."""
        return ratio(self.above.sum(axis=0), self.below.sum(axis=0))

    def by_task(self, draws: Draws) -> Floats:
        """(T, S)"""
        return ratio(*self.sums(draws.tasks, draws.count))


@dataclass(frozen=True)
class Sampled:
    """A figure of every system (S,), and in every bootstrap sample (R, S), drawn alike for all. NaN: nothing."""

    value: Floats
    drawn: Floats

    @classmethod
    def nothing(cls, systems: int) -> Sampled:
        return cls.certain(np.full(systems, np.nan))

    @classmethod
    def certain(cls, value: Floats) -> Sampled:
        return cls(value, value[None])

    def gained(self, systems: Sequence[int], others: Sequence[int]) -> Sampled:
        """How much more each of `systems` has than the one of `others` that it is paired with."""
        return Sampled(self.value[systems] - self.value[others], self.drawn[:, systems] - self.drawn[:, others])

    def estimates(self) -> list[Estimate]:
        """Rounded: the last digits of a sum depend on how many threads add it up."""
        ends = (np.where(np.isnan(end), self.value, end) for end in interval(self.drawn))
        figures = np.round([self.value, *ends], DIGITS) + 0.0  # no -0
        return [Estimate(*map(float, each)) for each in figures.T]


def _summed(values: Floats, units: Rows, count: int) -> Floats:
    result = np.zeros((count, values.shape[1]))
    np.add.at(result, units, values)
    return result


def ratio(above: Floats, below: Floats) -> Floats:
    """NaN where there is nothing below."""
    result: Floats = np.divide(above, below, out=np.full(np.shape(above), np.nan), where=np.asarray(below) > 0)
    return result


def mean(values: Floats, axis: int) -> Floats:
    """Of what is there; NaN if nothing is."""
    parts = Parts.of(values)
    return ratio(parts.above.sum(axis=axis), parts.below.sum(axis=axis))


def pooled(parts: Parts, draws: Draws) -> Sampled:
    """Every prompt counts alike."""
    above, below = parts.sums(draws.of, draws.units)
    distribution = np.concatenate([ratio(counts @ above, counts @ below) for counts in draws])
    return Sampled(parts.total, distribution)


def over_tasks(parts: Parts, draws: Draws, divisor: Parts | None = None) -> Sampled:
    """Every task counts alike: the mean over tasks of (the task's mean / the divisor's, (E, 1), if there is one)."""

    def told(above: Floats, below: Floats, over: Floats, under: Floats) -> Floats:
        return ratio(above, below) if divisor is None else ratio(ratio(above, below), ratio(over, under))

    def sums(units: Rows, count: int) -> list[Floats]:
        return [*parts.sums(units, count), *(divisor or parts).sums(units, count)]

    means = told(*sums(draws.tasks, draws.count))
    value = mean(means, axis=0)
    if draws.by_task:
        tasks = Parts.of(means)
        distribution = np.concatenate([ratio(counts @ tasks.above, counts @ tasks.below) for counts in draws])
        return Sampled(value, distribution)
    units, members = sums(draws.of, draws.units), [draws.members(task) for task in range(draws.count)]
    distribution = np.concatenate(
        [mean(np.stack([told(*(c[:, m] @ each[m] for each in units)) for m in members]), axis=0) for c in draws]
    )
    return Sampled(value, distribution)


def quantiles(values: Floats, prompts: Rows, shares: tuple[float, ...], draws: Draws) -> Sampled:
    """(shares,) the smallest value that such a share of all values (n,) is at most; `prompts` (n,): whose they are."""
    if not len(values):
        return Sampled.nothing(len(shares))
    order = np.argsort(values, kind="stable")
    ascending, units = values[order], draws.of[prompts[order]]
    wanted = np.array(shares) - 1e-12  # a share of n can come out a hair above the whole number that it is
    everything = np.ones((1, draws.units))
    at = _by_search if draws.by_task else _by_sums  # search needs a number to each value and unit
    drawn = [at(ascending, units, counts, wanted) for counts in (everything, *draws)]
    return Sampled(drawn[0][0], np.concatenate(drawn[1:]))


def _by_sums(ascending: Floats, units: Rows, counts: Floats, shares: Floats) -> Floats:
    """(r, shares) quantiles of values (n,) in ascending order, a unit's as often as it is drawn: counts (r, U)."""
    found = np.empty((len(counts), len(shares)))
    step = max(1, CHUNK // len(ascending))
    for start in range(0, len(counts), step):
        until = np.cumsum(counts[start : start + step, units], axis=1)  # (step, n)
        for place, share in enumerate(shares):
            first = (until >= share * until[:, -1:]).argmax(axis=1)
            found[start : start + step, place] = np.where(until[:, -1] > 0, ascending[first], np.nan)
    return found


def _by_search(ascending: Floats, units: Rows, counts: Floats, shares: Floats) -> Floats:
    """The same, by halving: quick where there are few units."""
    n = len(ascending)
    until = np.zeros((n, counts.shape[1]))  # (n, U) values of each unit up to here
    until[np.arange(n), units] = 1
    np.cumsum(until, axis=0, out=until)
    total = counts @ until[-1]  # (r,)
    found = np.empty((len(counts), len(shares)))
    for place, share in enumerate(shares):
        low, high = np.zeros(len(counts), np.int64), np.full(len(counts), n - 1)
        while (low < high).any():
            middle = (low + high) // 2
            enough = (until[middle] * counts).sum(axis=1) >= share * total
            low, high = np.where(enough, low, middle + 1), np.where(enough, middle, high)
        found[:, place] = np.where(total > 0, ascending[high], np.nan)
    return found


def gains(parts: Parts, draws: Draws) -> Floats:
    """(U, S) what each unit adds to the mean over tasks: its sum is the value of `over_tasks`."""
    means = Parts.of(parts.by_task(draws))
    tasks = np.maximum(means.below.sum(axis=0), 1)  # (S,)
    if draws.by_task:
        result: Floats = means.above / tasks
        return result
    below = _summed(parts.below, draws.tasks, draws.count)[draws.tasks]  # (E, S) prompts of the prompt's task
    share: Floats = parts.above / np.maximum(below, 1) / tasks
    return share
