"""What the pictures show, as plain figures: shares and means over the records of a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.figures import ratio
from eval.measuring import UNBOUNDED
from eval.records import EXPERT, Record, Regime, Run, TaskInfo

Floats = NDArray[np.float64]

BASE = "base model"  # no expert's name has a space
POINTS = 60  # of a curve


@dataclass(frozen=True)
class Grid:
    """`values` (rows, columns), NaN where there is nothing; `own`: cells where a task meets its own expert."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Floats
    own: tuple[tuple[int, int], ...] = ()

    def only(self, rows: Sequence[bool] | NDArray[np.bool_]) -> Grid:
        kept = [k for k, keep in enumerate(rows) if keep]
        own = tuple((kept.index(row), column) for row, column in self.own if row in kept)
        return Grid(tuple(self.rows[k] for k in kept), self.columns, self.values[kept], own)

    def json(self) -> dict[str, Any]:
        values = [[None if np.isnan(value) else round(float(value), 4) for value in row] for row in self.values]
        return {"rows": self.rows, "columns": self.columns, "values": values}


@dataclass(frozen=True)
class Curve:
    """What would be if a router answered only where it is surer than a limit, from the surest prompt on.

    answered  share of prompts with experts that an expert answers (not the base model)
    score     their mean score
    accepted  share of prompts out of domain that an expert answers as well; empty where there are none
    """

    answered: tuple[float, ...]
    score: tuple[float, ...]
    accepted: tuple[float, ...] = ()

    def json(self) -> dict[str, Any]:
        return {"answered": self.answered, "score": self.score, "false_accepts": self.accepted}


@dataclass(frozen=True)
class Gates:
    """Of one router: `weights` by module group and expert, a mean over traced prompts; and each token's expert.

    tokens  (prompt, columns of the experts with most weight, token by token)
    """

    router: str
    gate: str
    weights: Grid
    tokens: tuple[tuple[str, tuple[int, ...]], ...]

    def json(self) -> dict[str, Any]:
        tokens = [{"prompt": prompt, "top": top} for prompt, top in self.tokens]
        return {"router": self.router, "gate": self.gate, **self.weights.json(), "tokens": tokens}


class Tally:
    """What pictures need of the records, added up one by one: some numbers to a router, whatever answers say."""

    def __init__(self, run: Run) -> None:
        self.run = run
        owners = list(dict.fromkeys(owner for task in run.tasks for owner in task.owners))
        names = [expert.name for expert in run.experts]
        own_first = sorted(names, key=lambda name: owners.index(name) if name in owners else len(owners))
        self.columns = (BASE, *own_first)  # in the order of their tasks, so that who is right is on the diagonal
        self._column = {name: k for k, name in enumerate(self.columns)}
        self._row = {task.name: k for k, task in enumerate(run.tasks)}
        shape = (len(self._row), len(self.columns))
        self._scores, self._scored = np.zeros(shape), np.zeros(shape)
        self._answered: dict[str, Floats] = defaultdict(lambda: np.zeros(shape))
        self._sure: dict[tuple[Regime, str], _Sure] = defaultdict(_Sure)

    def add(self, record: Record) -> None:
        row = self._row.get(record.task)
        if row is None:
            return
        inside = record.regime == "in-distribution"
        column = self._column.get(BASE if record.router == "base" else record.router.removeprefix(EXPERT))
        of_matrix = inside and (record.router == "base" or record.router.startswith(EXPERT))
        if of_matrix and column is not None and record.score is not None:
            self._scores[row, column] += record.score
            self._scored[row, column] += 1
        if record.router.startswith(EXPERT):
            return
        self._sure[record.regime, record.router].add(record)
        known = record.experts or record.kind == "base"  # an endpoint that routes by itself may not say who answered
        if inside and known and record.error is None:
            whole = sum(abs(weight) for _, weight in record.experts)
            for name, weight in record.experts or ((BASE, 1.0),):
                if name in self._column:
                    self._answered[record.router][row, self._column[name]] += abs(weight) / whole if whole else 1.0

    def matrix(self) -> Grid:
        """Mean score of every expert, and of the base model, on every task that has one."""
        return self._grid(ratio(self._scores, self._scored), lambda task: bool(task.owners))

    def confusion(self, router: str) -> Grid:
        """In-distribution: of each task's prompts the share that each expert answered; a blend's share by weights."""
        answered = self._answered[router]
        return self._grid(ratio(answered, answered.sum(axis=1, keepdims=True)), lambda task: True)

    def abstention(self, regime: Regime, router: str) -> Curve | None:
        return self._sure[regime, router].curve() if (regime, router) in self._sure else None

    def _grid(self, values: Floats, wanted: Callable[[TaskInfo], bool]) -> Grid:
        tasks = [(k, task) for k, task in enumerate(self.run.tasks) if wanted(task)]
        own = [(row, self._column[each]) for row, (_, task) in enumerate(tasks) for each in task.owners
               if each in self._column]  # fmt: skip
        return Grid(tuple(task.name for _, task in tasks), self.columns, values[[k for k, _ in tasks]], tuple(own))


class _Sure:
    """How sure a router was of what it answered, in one regime."""

    def __init__(self) -> None:
        self.inside: list[tuple[float, float]] = []  # of prompts that an expert answered: confidence, score
        self.outside: list[float] = []  # confidence, of prompts out of domain that an expert answered
        self.asked = self.strangers = 0

    def add(self, record: Record) -> None:
        if record.metric in UNBOUNDED:
            return
        self.asked += record.score is not None
        self.strangers += not record.owners
        if record.kind == "base" or record.confidence is None:
            return
        if not record.owners:
            self.outside.append(record.confidence)
        elif record.score is not None:
            self.inside.append((record.confidence, record.score))

    def curve(self) -> Curve | None:
        """None where it is never unsure, or nobody ever answers."""
        if len({confidence for confidence, _ in self.inside}) < 2:
            return None
        sure, scores = np.array(sorted(self.inside, key=lambda each: -each[0])).T
        ends = np.flatnonzero(np.append(np.diff(sure) < 0, True))  # prompts of equal confidence are answered together
        ends = ends[np.unique(np.linspace(0, len(ends) - 1, POINTS).astype(int))]
        outside = np.sort(self.outside)
        limits = [
            *sure[ends],
            -np.inf,
        ]  # at last the router as it is: it also answers who is less sure than any of these
        accepted = (len(outside) - np.searchsorted(outside, limits)) / max(self.strangers, 1)
        ends = np.append(ends, ends[-1])
        means = np.cumsum(scores)[ends] / (ends + 1)
        return Curve(_rounded((ends + 1) / self.asked), _rounded(means), _rounded(accepted) if self.strangers else ())


def _rounded(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(round(float(value), 4) for value in values)


def gates(run: Run) -> list[Gates]:
    """One to each router with traces; an expert that is no member of a prompt's composite has no weight in it."""
    traced: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for each in run.traces:
        if each.get("trace"):
            traced[str(each["router"])].append(each)
    return [_gates(router, found) for router, found in traced.items()]


def _gates(router: str, found: Sequence[Mapping[str, Any]]) -> Gates:
    members = [[str(name).partition("@")[0] for name in each["trace"]["experts"]] for each in found]
    experts = sorted({name for names in members for name in names})
    groups = list(dict.fromkeys(group for each in found for group in each["trace"]["groups"] if group))
    sums, counts = np.zeros((len(groups), len(experts))), np.zeros((len(groups), 1))
    tokens = []
    for each, names in zip(found, members, strict=True):
        columns = [experts.index(name) for name in names]
        for group, weights in zip(each["trace"]["groups"], each["trace"]["weights"], strict=True):
            if group:
                sums[groups.index(group), columns] += weights
                counts[groups.index(group)] += 1
        prompt = str(each.get("prompt") or each.get("example", ""))
        tokens.append((prompt, tuple(columns[top] for top in each["trace"]["top"])))
    gate = str(found[0]["trace"].get("gate", ""))
    return Gates(router, gate, Grid(tuple(groups), tuple(experts), sums / counts), tuple(tokens))
