"""From the columns of records to the rows of a table: the figures of every router of a regime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
from scipy.stats import false_discovery_control, rankdata  # type: ignore[import-untyped]

from eval.columns import Bools, Columns, Floats, loads
from eval.figures import DIGITS, Parts, Sampled, gains, over_tasks, pooled, quantiles, ratio
from eval.intervals import Draws, flipped
from eval.ranking import borda, kemeny, places
from eval.records import REFERENCES, Regime, RouterInfo, Run
from eval.scoring import METRICS
from eval.sections import FIGURES, Difference, Row, Section

#: Metrics that are not from 0 to 1: their means do not go with others.
UNBOUNDED = frozenset(name for name, metric in METRICS.items() if metric.needs == "likelihood")
KNOW = ("oracle", "best-per-query")  # rows that know what is right: not ranked with those that could be served


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
        return ratio(total, count)

    @cached_property
    def score(self) -> Floats:
        return self.mean(self.columns["score"])


class Measured:
    """The columns of one slice of a run. E prompts, of all regimes."""

    def __init__(self, run: Run, columns: Columns, baseline: str, *, sliced: bool, resamples: int, seed: int) -> None:
        self.run, self.columns, self.baseline, self.sliced = run, columns, baseline, sliced
        self.resamples, self.seed = resamples, seed
        self._draws: dict[bytes, Draws] = {}
        self.task = np.array([each.task for each in columns.examples], object)
        self.owned: Bools = np.array([bool(each.owners) for each in columns.examples], bool)
        self.unbounded: Bools = np.array([each.metric in UNBOUNDED for each in columns.examples], bool)
        self.judged: Bools = np.array([each.metric != "none" for each in columns.examples], bool)
        pairs = np.unique(np.stack([columns.ints("router"), columns.ints("seed")]), axis=1)[0]
        self.seeds = dict(zip(columns.routers, np.bincount(pairs, minlength=len(columns.routers)), strict=True))

    @cached_property
    def oracle(self) -> Floats:
        """(E, 1) its scores in-distribution; of a run without that regime, in the first that there is."""
        found = (Grid(self.columns.of(regime), ["oracle"]).score for regime in self.run.regimes)
        return next((each for each in found if not np.isnan(each).all()), np.full((len(self.owned), 1), np.nan))

    def section(self, regime: Regime) -> Section:
        columns = self.columns.of(regime)
        seen = {columns.routers[number] for number in np.unique(columns.ints("router"))}
        infos = _ordered(self.run, seen)
        grid = Grid(columns, [info.name for info in infos])
        tasks = tuple(dict.fromkeys(self.task[self.owned]))
        asked = self.owned if regime != "in-distribution" else np.ones(len(self.owned), bool)
        figures = {name: figure.estimates() for name, figure in self.figures(grid, regime).items()}
        means = Parts.of(grid.score[self.owned]).by_task(self.draws(self.owned)) if tasks else np.zeros((0, len(infos)))
        rows = [
            Row(
                router=info,
                figures={name: each[number] for name, each in figures.items() if not np.isnan(each[number].value)},
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
            drawn="tasks" if self.draws(self.comparable).by_task else "prompts",
            ranked=ranked,
            exact=exact,
            absent=tuple(info.name for info in self.run.routers if info.kind != "expert" and info.name not in seen),
            left_out=self.left_out,
        )

    @property
    def comparable(self) -> Bools:
        """(E,) prompts with scores whose mean over tasks means something."""
        return self.owned & self.judged & ~self.unbounded

    def draws(self, which: Bools) -> Draws:
        """Of these prompts (E,)."""
        key = which.tobytes()
        if key not in self._draws:
            self._draws[key] = Draws(self.task[which].tolist(), resamples=self.resamples, seed=self.seed)
        return self._draws[key]

    @cached_property
    def left_out(self) -> dict[str, str]:
        """Why a task is not in `score` or not in `normalised`."""
        reasons = {}
        for task in dict.fromkeys(self.task[self.owned]):
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

    def figures(self, grid: Grid, regime: Regime) -> dict[str, Sampled]:
        """By name, in the order of `FIGURES`, of all rows of the grid."""
        columns, score = grid.columns, grid.score
        comparable = self.comparable
        normal = comparable & ~np.isin(self.task, list(self.left_out))
        found = {
            "score": self._over_tasks(score, comparable),
            "normalised": self._over_tasks(score, normal, self.oracle),
            "abstained": self._pooled(grid.mean(columns["base"]), self.owned),
            "flops": self._pooled(grid.mean(columns["flops"]), self.owned),
            "loads": Sampled.certain(np.array([self._loads(grid, row) for row in range(len(grid.rows))])),
            **self._speed(grid),
        }
        if "best-per-query" in grid.rows:
            found["regret"] = self._pooled(score[:, [grid.rows.index("best-per-query")]] - score, comparable)
        if regime == "in-distribution":
            ranks = columns["rank"]
            ranking = np.isin(grid.row, np.unique(grid.row[columns["ranks"] > 0]))
            for name, within in (("top1", 1), ("top3", 3)):
                right = ((ranks >= 1) & (ranks <= within)).astype(np.float64)
                found[name] = self._pooled(grid.mean(right, ranking), self.owned)
            found["false_accepts"] = self._pooled(grid.mean(1 - columns["base"]), ~self.owned)
        return {name: found[name] for name in FIGURES if name in found}

    def _over_tasks(self, values: Floats, which: Bools, divisor: Floats | None = None) -> Sampled:
        if not which.any():
            return Sampled.nothing(values.shape[1])
        over = None if divisor is None else Parts.of(divisor[which])
        return over_tasks(Parts.of(values[which]), self.draws(which), over)

    def _pooled(self, values: Floats, which: Bools) -> Sampled:
        return pooled(Parts.of(values[which]), self.draws(which)) if which.any() else Sampled.nothing(values.shape[1])

    def _speed(self, grid: Grid) -> dict[str, Sampled]:
        if not self.owned.any():
            return {}
        columns, draws = grid.columns, self.draws(self.owned)
        latency, prompt = columns["latency"], (np.cumsum(self.owned) - 1)[columns.ints("example")]
        timed = ~np.isnan(latency) & self.owned[columns.ints("example")]
        tokens, _ = grid.sums(columns["tokens"], timed)
        waited, _ = grid.sums(columns["seconds"], timed & (columns["tokens"] > 0))
        each = []
        for row in range(len(grid.rows)):
            mine = timed & (grid.row == row)
            each.append(quantiles(latency[mine], prompt[mine], (0.5, 0.95), draws))
        found = {"tokens_per_s": pooled(Parts(tokens[self.owned], waited[self.owned]), draws)}
        for place, name in enumerate(("p50_ms", "p95_ms")):
            value = np.array([one.value[place] for one in each])
            none = np.full(self.resamples, np.nan)
            found[name] = Sampled(
                value,
                np.stack([none if np.isnan(one.value[place]) else one.drawn[:, place] for one in each], axis=1),
            )
        return found

    def _loads(self, grid: Grid, row: int) -> float:
        """Of one pass over the prompts: each seed begins with nothing loaded."""
        mine = grid.row == row
        seed, adapter = grid.columns.ints("seed")[mine], grid.columns.ints("adapter")[mine]
        passes = [loads(adapter[seed == each].tolist(), self.run.resident) for each in np.unique(seed)]
        return float(np.mean(passes)) if passes else 0.0

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
        which = self.comparable
        if self.baseline not in grid.rows or not which.any():
            return [None] * len(infos)
        base = grid.rows.index(self.baseline)
        gained = grid.score[which] - grid.score[which][:, [base]]
        parts, draws = Parts.of(gained), self.draws(which)
        p = flipped(gains(parts, draws), seed=self.seed)
        prompts = parts.below.sum(axis=0).astype(int)
        q = np.ones(len(infos))
        for kind in ("reference", "router"):
            family = [n for n, info in enumerate(infos) if info.kind == kind and n != base and prompts[n]]
            if family:
                q[family] = false_discovery_control(p[family])
        return [
            Difference(each, float(p[n]), float(q[n]), int(prompts[n])) if n != base and prompts[n] else None
            for n, each in enumerate(over_tasks(parts, draws).estimates())
        ]


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
    by_borda = rankdata(-np.round(points, DIGITS), method="min").astype(int)
    by_kemeny = places(scores, order)
    for column, number in enumerate(ranked):
        rows[number] = replace(
            rows[number],
            borda=float(points[column]),
            borda_place=int(by_borda[column]),
            kemeny_place=by_kemeny[column],
        )
    return rows, len(scores), exact
