"""From the columns of records to the rows of a table: the figures of every router of a regime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
from scipy.stats import false_discovery_control, rankdata  # type: ignore[import-untyped]

from eval.columns import Bools, Columns, Floats, loads
from eval.figures import Parts, gains, over_tasks, pooled, quantiles
from eval.intervals import Draws, Estimate, flipped
from eval.ranking import borda, kemeny
from eval.records import REFERENCES, Regime, RouterInfo, Run
from eval.sections import FIGURES, Difference, Row, Section

UNBOUNDED = ("log_likelihood",)  # metrics whose means do not go with others
KNOW = ("oracle", "best-per-query")  # rows that know what is right: not ranked with those that could be served
DIGITS = 12  # of task means that are compared: sums in another order make no difference


class Grid:
    """Records of one regime, as matrices (E, S) of prompts and rows: means over seeds, NaN where there is no record."""

    def __init__(self, columns: Columns, rows: Sequence[str]) -> None:
        self.columns, self.rows = columns, tuple(rows)
        number = {name: place for place, name in enumerate(rows)}
        of = np.array([number.get(name, -1) for name in columns.routers] or [-1], np.int64)
        self.row = of[columns.ints("router")] if len(columns) else np.zeros(0, np.int64)
        self.cell = columns.ints("example") * len(rows) + self.row
        self.shape = len(columns.examples), len(rows)

    def sums(self, values: Floats, where: Bools) -> tuple[Floats, Floats]:
        """Of the values of records (n,), and of how many, in each cell."""
        kept = where & (self.row >= 0)
        size = self.shape[0] * self.shape[1]
        total: Floats = np.bincount(self.cell[kept], values[kept], minlength=size).astype(np.float64)
        count = np.bincount(self.cell[kept], minlength=size).astype(np.float64)
        return total.reshape(self.shape), count.reshape(self.shape)

    def mean(self, values: Floats, where: Bools | None = None) -> Floats:
        there = ~np.isnan(values) if where is None else where & ~np.isnan(values)
        total, count = self.sums(values, there)
        result: Floats = np.divide(total, count, out=np.full(self.shape, np.nan), where=count > 0)
        return result

    @cached_property
    def score(self) -> Floats:
        return self.mean(self.columns["score"])


class Measured:
    """The columns of one slice of a run. E prompts, of all regimes."""

    def __init__(self, run: Run, columns: Columns, baseline: str, *, sliced: bool, resamples: int, seed: int) -> None:
        self.run, self.columns, self.baseline, self.sliced = run, columns, baseline, sliced
        self.resamples, self.seed = resamples, seed
        self.task = np.array([each.task for each in columns.examples], object)
        self.owned: Bools = np.array([bool(each.owners) for each in columns.examples], bool)
        self.unbounded: Bools = np.array([each.metric in UNBOUNDED for each in columns.examples], bool)
        self.judged: Bools = np.array([each.metric != "none" for each in columns.examples], bool)
        pairs = np.unique(np.stack([columns.ints("router"), columns.ints("seed")]), axis=1)[0]
        self.seeds = dict(zip(columns.routers, np.bincount(pairs, minlength=len(columns.routers)), strict=True))

    @cached_property
    def oracle(self) -> Floats:
        """(E, 1) its scores in-distribution; of a run without that regime, in the first that there is."""
        found = [Grid(self.columns.of(regime), ["oracle"]).score for regime in self.run.regimes]
        return next((each for each in found if not np.isnan(each).all()), np.full((len(self.owned), 1), np.nan))

    def section(self, regime: Regime) -> Section:
        columns = self.columns.of(regime)
        seen = {columns.routers[number] for number in np.unique(columns.ints("router"))}
        infos = _ordered(self.run, seen)
        grid = Grid(columns, [info.name for info in infos])
        tasks = tuple(dict.fromkeys(self.task[self.owned]))
        asked = self.owned if regime != "in-distribution" else np.ones(len(self.owned), bool)
        left_out = self._left_out(tasks)
        figures = self._figures(grid, regime, left_out)
        means = (
            Parts.of(grid.score[self.owned]).by_task(self._draws(self.owned)) if tasks else np.zeros((0, len(infos)))
        )
        rows = [
            Row(
                router=info,
                figures=figures[number],
                counts=self._counts(grid, number, asked),
                tasks={task: float(mean) for task, mean in zip(tasks, means[:, number], strict=True) if mean == mean},
                difference=difference,
            )
            for number, (info, difference) in enumerate(zip(infos, self._differences(grid, infos), strict=True))
        ]
        rows, ranked, exact = _placed(rows, means)
        return Section(
            regime=regime,
            rows=tuple(rows),
            examples=int(asked.sum()),
            tasks=tasks,
            drawn="tasks" if self._draws(self._comparable).by_task else "prompts",
            ranked=ranked,
            exact=exact,
            absent=tuple(info.name for info in self.run.routers if info.kind != "expert" and info.name not in seen),
            left_out=left_out,
        )

    @property
    def _comparable(self) -> Bools:
        """(E,) prompts with scores whose mean over tasks means something."""
        return self.owned & self.judged & ~self.unbounded

    def _draws(self, which: Bools) -> Draws:
        return Draws(self.task[which].tolist(), resamples=self.resamples, seed=self.seed)

    def _left_out(self, tasks: Sequence[str]) -> dict[str, str]:
        """Why a task is not in `score` or not in `normalised`."""
        reasons = {}
        for task in tasks:
            of_task = self.owned & (self.task == task)
            scores = self.oracle[of_task, 0]
            if self.unbounded[of_task].any():
                reasons[task] = "its metric is not from 0 to 1: it is not in score and normalised"
            elif not self.judged[of_task].any():
                reasons[task] = "it has no metric"
            elif np.isnan(scores).all():
                reasons[task] = "the oracle has no score: it is not in normalised"
            elif not np.nansum(scores):
                reasons[task] = "the oracle scores 0: it is not in normalised"
        return reasons

    def _figures(self, grid: Grid, regime: Regime, left_out: dict[str, str]) -> list[dict[str, Estimate]]:
        columns, score = grid.columns, grid.score
        comparable = self._comparable
        normal = comparable & ~np.isin(self.task, list(left_out))
        found: dict[str, list[Estimate]] = {}
        found["score"] = self._over_tasks(score, comparable)
        found["normalised"] = self._over_tasks(score, normal, self.oracle)
        if "best-per-query" in grid.rows:
            found["regret"] = self._pooled(score[:, [grid.rows.index("best-per-query")]] - score, comparable)
        if regime == "in-distribution":
            ranks = columns["rank"]
            ranking = np.isin(grid.row, np.unique(grid.row[columns["ranks"] > 0]))
            for name, within in (("top1", 1), ("top3", 3)):
                right = ((ranks >= 1) & (ranks <= within)).astype(np.float64)
                found[name] = self._pooled(grid.mean(right, ranking), self.owned)
            found["false_accepts"] = self._pooled(grid.mean(1 - columns["base"]), ~self.owned)
        found["abstained"] = self._pooled(grid.mean(columns["base"]), self.owned)
        found["flops"] = self._pooled(grid.mean(columns["flops"]), self.owned)
        found |= self._speed(grid)
        return [
            {name: found[name][n] for name in FIGURES if name in found and not np.isnan(found[name][n].value)}
            for n in range(len(grid.rows))
        ]

    def _over_tasks(self, values: Floats, which: Bools, divisor: Floats | None = None) -> list[Estimate]:
        if not which.any():
            return _nothing(values.shape[1])
        over = None if divisor is None else Parts.of(divisor[which])
        return over_tasks(Parts.of(values[which]), self._draws(which), over)

    def _pooled(self, values: Floats, which: Bools) -> list[Estimate]:
        return pooled(Parts.of(values[which]), self._draws(which)) if which.any() else _nothing(values.shape[1])

    def _speed(self, grid: Grid) -> dict[str, list[Estimate]]:
        columns = grid.columns
        latency, seconds = columns["latency"], columns["seconds"]
        timed = ~np.isnan(latency) & self.owned[columns.ints("example")]
        tokens, waited = grid.sums(columns["tokens"], timed), grid.sums(seconds, timed & (columns["tokens"] > 0))
        rows = range(len(grid.rows))
        found: dict[str, list[Estimate]] = {name: _nothing(len(rows)) for name in ("p50_ms", "p95_ms", "tokens_per_s")}
        if self.owned.any():
            draws = self._draws(self.owned)
            place = np.cumsum(self.owned) - 1
            found["tokens_per_s"] = pooled(Parts(tokens[0][self.owned], waited[0][self.owned]), draws)
            for row in rows:
                mine = timed & (grid.row == row)
                prompts = place[columns.ints("example")[mine]]
                both = quantiles(latency[mine], prompts, (0.5, 0.95), draws)
                found["p50_ms"][row], found["p95_ms"][row] = both
        found["loads"] = [self._loads(grid, row) for row in rows]
        return found

    def _loads(self, grid: Grid, row: int) -> Estimate:
        """Of one pass over the prompts: each seed begins with nothing loaded."""
        mine = grid.row == row
        seed, adapter = grid.columns.ints("seed")[mine], grid.columns.ints("adapter")[mine]
        passes = [loads(adapter[seed == each].tolist(), self.run.resident) for each in np.unique(seed)]
        value = float(np.mean(passes)) if passes else 0.0
        return Estimate(value, value, value)

    def _counts(self, grid: Grid, row: int, asked: Bools) -> dict[str, int]:
        mine = grid.row == row
        columns = grid.columns
        failed = columns["error"][mine] > 0
        unanswered = np.isnan(columns["score"][mine]) & self.judged[columns.ints("example")[mine]]
        told = 0 if self.sliced else self._told(bool(asked.all()))
        expected = max(int(asked.sum()), told) * int(self.seeds[grid.rows[row]])
        answered = int((~(failed | unanswered)).sum())
        return {
            "expected": expected,
            "answered": answered,
            "missing": expected - answered,
            "errors": int(failed.sum()),
        }

    def _told(self, everything: bool) -> int:
        """How many prompts the run says that there are."""
        return sum(task.examples for task in self.run.tasks if everything or task.owners)

    def _differences(self, grid: Grid, infos: Sequence[RouterInfo]) -> list[Difference | None]:
        which = self._comparable
        if self.baseline not in grid.rows or not which.any():
            return [None] * len(infos)
        base = grid.rows.index(self.baseline)
        gained = grid.score[which] - grid.score[which][:, [base]]
        parts, draws = Parts.of(gained), self._draws(which)
        p = flipped(gains(parts, draws), seed=self.seed)
        prompts = parts.below.sum(axis=0).astype(int)
        q = np.ones(len(infos))
        for kind in ("reference", "router"):
            family = [n for n, info in enumerate(infos) if info.kind == kind and n != base and prompts[n]]
            if family:
                q[family] = false_discovery_control(p[family])
        return [
            Difference(each, float(p[n]), float(q[n]), int(prompts[n])) if n != base and prompts[n] else None
            for n, each in enumerate(over_tasks(parts, draws))
        ]


def _nothing(count: int) -> list[Estimate]:
    return [Estimate(np.nan, np.nan, np.nan)] * count


def _ordered(run: Run, seen: set[str]) -> list[RouterInfo]:
    """References in their order, then routers, families as they first appear in the run."""
    known = {info.name: info for info in run.routers if info.kind != "expert"}
    known |= {name: RouterInfo(name=name, family="") for name in sorted(seen) if name not in known}
    infos = [
        info.model_copy(update={"kind": "reference"}) if info.name in REFERENCES else info for info in known.values()
    ]
    families = list(dict.fromkeys(info.family for info in infos))
    references = list(REFERENCES)

    def place(info: RouterInfo) -> tuple[int, int]:
        if info.kind == "reference":
            return 0, references.index(info.name) if info.name in REFERENCES else len(references)
        return 1, families.index(info.family)

    return sorted((info for info in infos if info.name in seen), key=place)


def _placed(rows: list[Row], means: Floats) -> tuple[list[Row], int, bool]:
    """Places among the rows that could be served, over the tasks (T, S) that all of those have a score in."""
    ranked = [number for number, row in enumerate(rows) if row.name not in KNOW]
    scores = np.round(means[:, ranked], DIGITS)
    scores = scores[~np.isnan(scores).any(axis=1)]
    if not scores.size:
        return rows, 0, True
    points = borda(scores)
    order, exact = kemeny(scores)
    places = rankdata(-np.round(points, DIGITS), method="min").astype(int)
    for column, number in enumerate(ranked):
        rows[number] = replace(
            rows[number],
            borda=float(points[column]),
            borda_place=int(places[column]),
            kemeny_place=order.index(column) + 1,
        )
    return rows, len(scores), exact
