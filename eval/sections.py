"""What a table consists of: rows of figures, in a section for each regime. Plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from eval.intervals import Estimate
from eval.records import Regime, RouterInfo

ALPHA = 0.05  # of differences, corrected for how many routers are compared

#: What a row may tell, in the order of tables.
FIGURES = {
    "score": "mean over tasks of the mean score of their prompts",
    "normalised": "mean over tasks of the mean score / the oracle's in-distribution",
    "regret": "mean over prompts of what the best single expert or the base model has more on the prompt",
    "top1": "share of prompts whose own expert is ranked first",
    "top3": "share of prompts whose own expert is ranked among the first three",
    "abstained": "share of prompts with an expert of their own that the base model answered",
    "false_accepts": "share of prompts without an expert of their own that an expert answered",
    "p50_ms": "to decide and to answer, milliseconds, of half of the prompts at most",
    "p95_ms": "to decide and to answer, milliseconds, of 95 % of the prompts at most",
    "tokens_per_s": "tokens of an answer to each second of waiting for it, beside all that was asked at the same time",
    "loads": "times that an adapter had to be loaded, for all prompts in order",
    "flops": "floating-point operations to a token",
}
LOWER_IS_BETTER = ("regret", "false_accepts", "p50_ms", "p95_ms", "loads", "flops")


class CannotCompare(ValueError):
    """There is nothing to compare with, or nothing that both have."""


Mark = Literal["better", "worse", ""]


def mark(difference: float, q: float) -> Mark:
    """What a difference surely is; "" where it may be chance."""
    if q >= ALPHA or not difference:
        return ""
    return "better" if difference > 0 else "worse"


@dataclass(frozen=True)
class Difference:
    """To the baseline, of the mean over tasks, on the `prompts` that both have a score for.

    p  that equal routers would differ as much (sign flips); q: corrected for the number of routers (Benjamini-Hochberg)
    """

    estimate: Estimate
    p: float
    q: float
    prompts: int

    @property
    def mark(self) -> Mark:
        return mark(self.estimate.value, self.q)


@dataclass(frozen=True)
class Row:
    """One router.

    figures  by name (`FIGURES`); what says nothing about this router is not there
    counts   of records: expected, answered, missing (of these, errors were asked in vain)
    tasks    mean score of each task, in the metric of the task
    borda    mean over tasks of the share of other rows that it beats; places begin at 1, None: not ranked
    """

    router: RouterInfo
    figures: dict[str, Estimate] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    tasks: dict[str, float] = field(default_factory=dict)
    difference: Difference | None = None
    borda: float | None = None
    borda_place: int | None = None
    kemeny_place: int | None = None

    @property
    def name(self) -> str:
        return self.router.name

    def json(self) -> dict[str, Any]:
        told = self.difference
        return {
            "router": self.router.name,
            "kind": self.router.kind,
            "family": self.router.family,
            "about": self.router.about,
            "settings": self.router.settings,
            "figures": {name: self.figures[name].json() if name in self.figures else None for name in FIGURES},
            "difference": {**asdict(told), "mark": told.mark} if told else None,
            "borda": self.borda,
            "borda_place": self.borda_place,
            "kemeny_place": self.kemeny_place,
            "counts": self.counts,
            "tasks": self.tasks,
        }


@dataclass(frozen=True)
class Section:
    """The rows of one regime: references first, then routers, those of a family together.

    examples  prompts of this regime; `tasks` those that have experts of their own
    drawn     what intervals draw: "tasks", or with fewer than ten of them "prompts"
    ranked    tasks that the places are of: those that every ranked row has a score in
    exact     whether Kemeny's ranking is known to be the best one
    absent    routers of the run that have no records here
    left_out  tasks that are not in `normalised`, and perhaps not in `score`, with the reason
    """

    regime: Regime
    rows: tuple[Row, ...]
    examples: int = 0
    tasks: tuple[str, ...] = ()
    drawn: Literal["tasks", "prompts"] = "prompts"
    ranked: int = 0
    exact: bool = True
    absent: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    def json(self) -> dict[str, Any]:
        return {
            "examples": self.examples,
            "tasks": list(self.tasks),
            "drawn": self.drawn,
            "ranked": self.ranked,
            "exact": self.exact,
            "absent": list(self.absent),
            "left_out": self.left_out,
            "rows": [row.json() for row in self.rows],
        }
