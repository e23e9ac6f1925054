"""The table of a run: for each regime one row to a router, with intervals, compared and ranked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from eval.columns import Columns, columns_of
from eval.intervals import LEVEL, RESAMPLES
from eval.measuring import Measured
from eval.records import Record, Regime, Run
from eval.sections import CannotCompare, Section
from eval.slices import BadSlice, By, Where, slices


@dataclass(frozen=True)
class Table:
    """`where` is the slice, "" for everything; `slices` are tables of parts, if they were asked for, by their slice."""

    suite: str
    digest: str
    base: str
    baseline: str
    complete: bool
    missing: tuple[str, ...]
    where: str
    resamples: int
    seed: int
    regimes: dict[Regime, Section]
    slices: dict[str, Table] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """Everything, in an order that does not change; figures that say nothing are null."""
        return {
            "suite": self.suite,
            "digest": self.digest,
            "base": self.base,
            "baseline": self.baseline,
            "complete": self.complete,
            "missing": list(self.missing),
            "where": self.where,
            "intervals": {"level": LEVEL, "resamples": self.resamples, "seed": self.seed},
            "regimes": {regime: section.json() for regime, section in self.regimes.items()},
            "slices": {name: each.json() for name, each in self.slices.items()},
        }


def table(
    run: Run,
    records: Iterable[Record] | Columns,
    *,
    where: str | Iterable[str] | None = None,
    by: By | None = None,
    baseline: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Table:
    """`baseline` is the run's if not given; `by` makes further tables.

    Raises BadSlice, CannotCompare where the run has no such baseline, and NotARun where records do.

    Records are read once; `columns_of(records)` may be given to several calls instead.
    """
    columns = records if isinstance(records, Columns) else columns_of(records)
    slice_ = Where.parse(where)
    if baseline is not None and baseline not in columns.routers:
        raise CannotCompare(f"No router '{baseline}' to compare with. There are: {', '.join(columns.routers)}.")
    wanted = np.array([slice_.holds(example) for example in columns.examples], bool)
    if slice_.terms and not wanted.any():
        raise BadSlice(f"No example is in the slice {slice_.text}. {_what_there_is(columns)}")
    kept = columns.about(wanted)
    whole = _table(run, kept, slice_, baseline or run.baseline, resamples, seed)
    if by is None:
        return whole
    parts = {}
    for each in slices(by, kept.examples):
        inner = Where.parse([each])
        part = kept.about([inner.holds(example) for example in kept.examples])
        both = replace(inner, regimes=slice_.regimes, text=", ".join(filter(None, (slice_.text, inner.text))))
        parts[each] = _table(run, part, both, whole.baseline, resamples, seed)
    return replace(whole, slices=parts)


def _table(run: Run, columns: Columns, where: Where, baseline: str, resamples: int, seed: int) -> Table:
    measured = Measured(run, columns, baseline, sliced=bool(where.terms), resamples=resamples, seed=seed)
    regimes = [regime for regime in run.regimes if regime in where.regimes]
    return Table(
        suite=run.suite,
        digest=run.digest,
        base=run.base,
        baseline=baseline,
        complete=run.complete,
        missing=run.missing,
        where=where.text,
        resamples=resamples,
        seed=seed,
        regimes={regime: measured.section(regime) for regime in regimes},
    )


def _what_there_is(columns: Columns) -> str:
    seen = columns.examples
    return "; ".join(
        f"{name}: {', '.join(values) or '(none)'}"
        for name, values in (
            ("tags", sorted({tag for each in seen for tag in each.tags})),
            ("tasks", sorted({each.task for each in seen})),
            ("experts", sorted({owner for each in seen for owner in each.owners})),
        )
    )
