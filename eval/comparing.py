"""Two runs, or two routers of a run, on the same prompts: what does the second do better or worse than the first?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import false_discovery_control  # type: ignore[import-untyped]

from eval.asking import Tell
from eval.columns import Bools, Columns, Floats, columns_of
from eval.figures import Parts, gains
from eval.intervals import RESAMPLES, Estimate, flipped
from eval.measuring import KNOW, Grid, Measured
from eval.records import REGIMES, Regime, Run, read_records, read_run
from eval.sections import FIGURES, LOWER_IS_BETTER, CannotCompare, Mark, mark
from eval.slices import Where

SOME = 5  # names that a note tells
ROUNDING = 1e-9  # a loss of exactly the most that is allowed passes


@dataclass(frozen=True)
class Side:
    """One run, or one router of it; `name` is what the user calls it."""

    name: str
    run: Run
    columns: Columns = field(repr=False)
    router: str | None = None

    @property
    def routers(self) -> tuple[str, ...]:
        """Rows of its table, in the order of the run."""
        known = [info.name for info in self.run.routers if info.name in self.columns.routers]
        return tuple(dict.fromkeys([*known, *self.columns.routers]))

    @property
    def regimes(self) -> tuple[Regime, ...]:
        return tuple(REGIMES[number] for number in np.unique(self.columns.ints("regime")))


@dataclass(frozen=True)
class Change:
    """One figure of the first and of the second, and how much more the second has."""

    first: float
    second: float
    difference: Estimate


@dataclass(frozen=True)
class Pair:
    """Two routers in a regime, on the `prompts` that both have answered; `left_out` are those that only one has.

    p, q  of the difference of scores, as in a table; None: there are no scores
    """

    regime: Regime
    first: str
    second: str
    prompts: int
    left_out: int
    figures: dict[str, Change]
    p: float | None = None
    q: float | None = None

    @property
    def name(self) -> str:
        return self.first if self.first == self.second else f"{self.first} > {self.second}"

    @property
    def mark(self) -> Mark:
        return mark(self.figures["score"].difference.value, self.q) if self.q is not None else ""

    def json(self) -> dict[str, Any]:
        figures = {name: asdict(self.figures[name]) if name in self.figures else None for name in FIGURES}
        told = {name: getattr(self, name) for name in ("regime", "first", "second", "prompts", "left_out")}
        return {**told, "figures": figures, "p": self.p, "q": self.q, "mark": self.mark}


@dataclass(frozen=True)
class Comparison:
    """`notes` say in what the two sides differ; `lacking` what the second lacks of what the first has."""

    first: str
    second: str
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()
    complete: bool = True
    where: str = ""

    @property
    def whole(self) -> bool:
        """Whether nothing could hide a regression."""
        return self.complete and not self.lacking

    def json(self) -> dict[str, Any]:
        told = {name: getattr(self, name) for name in ("first", "second", "where", "complete")}
        lists = {"notes": list(self.notes), "lacking": list(self.lacking)}
        return {**told, **lists, "pairs": [pair.json() for pair in self.pairs]}


def sides(*given: str, tell: Tell = lambda what, done, total: None) -> list[Side]:
    """Each FOLDER, or FOLDER:ROUTER. Raises NotARun, CannotCompare."""
    folders = [_split(each) for each in given]
    runs = {folder: read_run(folder) for folder, _ in folders}
    read = {folder: columns_of(read_records(folder), tell, run.expected) for folder, run in runs.items()}
    found = [
        Side(name, runs[folder], read[folder], router) for name, (folder, router) in zip(given, folders, strict=True)
    ]
    for each in found:
        if each.router is not None and each.router not in each.routers:
            raise CannotCompare(f"{each.name}: no such router in the run. There are: {', '.join(each.routers)}.")
    return found


def _split(given: str) -> tuple[Path, str | None]:
    if not Path(given).is_dir():
        for place in (n for n, letter in enumerate(given) if letter == ":"):
            if Path(given[:place]).is_dir():
                return Path(given[:place]), given[place + 1 :]
    return Path(given), None


def compare(
    first: Side,
    second: Side,
    *,
    routers: Sequence[str] = (),
    regimes: Sequence[str] = (),
    where: str | Iterable[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Paired by prompt, router and regime; `routers`, `regimes`: only these. Raises CannotCompare, BadSlice.

    Both are held against the oracle (`normalised`) and the best expert for each prompt (`regret`) of the first.
    """
    slice_ = Where.parse(where)
    names = _names(first, second, routers)
    if unknown := [name for name in regimes if name not in REGIMES]:
        raise CannotCompare(f"No regime {', '.join(unknown)}. There are: {', '.join(REGIMES)}.")
    ours = first.columns.about([slice_.holds(example) for example in first.columns.examples])
    theirs = second.columns.about([slice_.holds(example) for example in second.columns.examples])
    number = {example: n for n, example in enumerate(theirs.examples)}
    common = [n for n, example in enumerate(ours.examples) if example in number]
    if not common:
        raise CannotCompare(f"{first.name} and {second.name} have no prompt in common{_in(slice_)}.")
    both = ours.numbered(common), theirs.numbered([number[ours.examples[n]] for n in common])
    wanted = [regime for regime in slice_.regimes if not regimes or regime in regimes]
    pairs = [pair for regime in wanted for pair in _pairs(first.run, *both, regime, names, resamples, seed)]
    if not pairs:
        raise CannotCompare(f"No router has records of the same prompts in both{_in(slice_)}: {', '.join(wanted)}.")
    return Comparison(
        first=first.name,
        second=second.name,
        pairs=tuple(pairs),
        notes=tuple(_notes(first, second, ours, theirs)),
        lacking=tuple(_lacking(ours, theirs, wanted, names, pairs)),
        complete=first.run.complete and second.run.complete,
        where=slice_.text,
    )


def _names(first: Side, second: Side, routers: Sequence[str]) -> list[tuple[str, str]]:
    """Who is compared with whom."""
    if first.router or second.router:
        return [(str(first.router or second.router), str(second.router or first.router))]
    if unknown := [name for name in routers if name not in first.routers]:
        raise CannotCompare(f"{first.name} has no router {', '.join(unknown)}. It has: {', '.join(first.routers)}.")
    return [(name, name) for name in first.routers if not routers or name in routers]


def _in(slice_: Where) -> str:
    return f" in the slice {slice_.text}" if slice_.text else ""


def _pairs(
    run: Run,
    ours: Columns,
    theirs: Columns,
    regime: Regime,
    names: Sequence[tuple[str, str]],
    resamples: int,
    seed: int,
) -> list[Pair]:
    """Of one regime: firsts and seconds are rows of one grid, so that they are drawn together."""
    here, there = ours.of(regime), theirs.of(regime)
    names = [(a, b) for a, b in names if _has(here, a) and _has(there, b)]
    if not names:
        return []
    grids = Grid(here, [a for a, _ in names]), Grid(there, [b for _, b in names])
    answered = [_answered(grid) for grid in grids]
    together = answered[0] & answered[1]  # (E, pairs)
    rows = [*(f"first {n}" for n in range(len(names))), *(f"second {n}" for n in range(len(names))), *KNOW]
    beside = _beside(ours, grids, together, rows)
    measured = Measured(run, beside, "", sliced=True, resamples=resamples, seed=seed)
    grid = Grid(beside.of(regime), rows)
    firsts, seconds = np.arange(2 * len(names)).reshape(2, -1).tolist()
    changes: list[dict[str, Change]] = [{} for _ in names]
    for name, figure in measured.figures(grid, regime).items():
        for n, gained in enumerate(figure.gained(seconds, firsts).estimates()):
            if not np.isnan(gained.value):
                value = figure.value[firsts[n]], figure.value[seconds[n]]
                changes[n][name] = Change(float(value[0]), float(value[1]), gained)
    p, q = _significance(grid.score[:, seconds] - grid.score[:, firsts], measured, seed)
    counts = together.sum(axis=0).tolist(), (answered[0] ^ answered[1]).sum(axis=0).tolist()
    return [
        Pair(regime, a, b, counts[0][n], counts[1][n], changes[n], *((p[n], q[n]) if "score" in changes[n] else ()))
        for n, (a, b) in enumerate(names)
        if counts[0][n]
    ]


def _beside(ours: Columns, grids: tuple[Grid, Grid], together: Bools, rows: Sequence[str]) -> Columns:
    """Records of firsts, then of seconds, of prompts that both have; the first's references in every regime."""
    parts = [ours.renamed({name: name for name in KNOW}, rows)]
    for place, grid in enumerate(grids):
        there = (grid.row >= 0) & together[grid.columns.ints("example"), grid.row]
        names = {name: rows[place * len(grid.rows) + n] for n, name in enumerate(grid.rows)}
        parts.append(grid.columns.where(there).renamed(names, rows))
    return parts[0].joined(parts[1:])


def _has(columns: Columns, router: str) -> bool:
    return router in columns.routers and bool((columns.ints("router") == columns.routers.index(router)).any())


def _answered(grid: Grid) -> Bools:
    """(E, S) where there is a record, with a score if there is something to be right about."""
    columns = grid.columns
    judged = np.array([example.metric != "none" for example in columns.examples], bool)
    there = (columns["error"] == 0) & ~(judged[columns.ints("example")] & np.isnan(columns["score"]))
    return grid.sums(np.ones(len(columns)), there)[1] > 0


def _significance(gained: Floats, measured: Measured, seed: int) -> tuple[list[float], list[float]]:
    """p and q for each pair, of what its second gains (E, pairs)."""
    which = measured.comparable
    if not which.any():
        return [1.0] * gained.shape[1], [1.0] * gained.shape[1]
    p = flipped(gains(Parts.of(gained[which]), measured.draws(which)), seed=seed)
    return p.tolist(), false_discovery_control(p).tolist()


def _notes(first: Side, second: Side, ours: Columns, theirs: Columns) -> Iterator[str]:
    """In what the two differ, as far as it is not what was asked."""
    for each in (first, second):
        if not each.run.complete:
            yield f"{each.name} is incomplete: {_some(each.run.missing) or 'the run did not end'}."
    a, b = first.run, second.run
    if a.suite != b.suite:
        yield f"The suites differ: {a.suite} and {b.suite}."
    elif a.digest != b.digest:
        yield f"The suite is not the same in both: its digest is {a.digest[:12]} and {b.digest[:12]}."
    if a.base != b.base:
        yield f"The base models differ: {a.base} and {b.base}."
    digests = [{expert.name: expert.digest for expert in run.experts} for run in (a, b)]
    if changed := [name for name, digest in digests[0].items() if digests[1].get(name, digest) != digest]:
        yield f"Experts that are not the same in both: {_some(changed)}."
    if a.resident != b.resident:
        yield f"Loads are counted for {a.resident} adapters that stay loaded, also of {second.name}."
    yield from _only(first, second, "Experts", *digests)
    if not first.router and not second.router:
        yield from _only(first, second, "Routers", first.routers, second.routers)
        yield from _only(first, second, "Regimes", first.regimes, second.regimes)
    ids = [{example.id: example for example in each.examples} for each in (ours, theirs)]
    yield from _only(first, second, "Prompts", *ids)
    if unlike := [name for name, example in ids[0].items() if ids[1].get(name, example) != example]:
        yield f"{len(unlike)} prompts are not the same in both and left out: {_some(unlike)}."


def _only(first: Side, second: Side, what: str, ours: Iterable[str], theirs: Iterable[str]) -> Iterator[str]:
    ours, theirs = dict.fromkeys(ours), dict.fromkeys(theirs)
    for name, these, those in ((first.name, ours, theirs), (second.name, theirs, ours)):
        if alone := [each for each in these if each not in those]:
            yield f"{what} that only {name} has, left out: {_some(alone)}."


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SOME]) + (f" and {len(names) - SOME} more" if len(names) > SOME else "")


def _lacking(
    ours: Columns,
    theirs: Columns,
    regimes: Sequence[Regime],
    names: Sequence[tuple[str, str]],
    pairs: Sequence[Pair],
) -> Iterator[str]:
    """What a regression could hide in, apart from what the run itself says that it misses."""
    there = set(theirs.examples)
    asked = {n for regime in regimes for n in np.unique(ours.of(regime).ints("example"))}
    if missing := [ours.examples[n].id for n in sorted(asked) if ours.examples[n] not in there]:
        yield f"{len(missing)} prompts: {_some(missing)}"
    found = {(pair.regime, pair.first) for pair in pairs}
    for regime in regimes:
        here = ours.of(regime)
        if lost := [b for a, b in names if _has(here, a) and (regime, a) not in found]:
            yield f"{regime}: {_some(lost)}"
    for pair in pairs:
        if pair.left_out:
            yield f"{pair.regime}, {pair.second}: {pair.left_out} prompts that only one of both has answered"


@dataclass(frozen=True)
class Verdict:
    """Of a gate on one figure of a pair. `gain`: of the second, so that more is better, whatever the figure."""

    pair: Pair
    gain: Estimate
    passed: bool
    reason: str


def gate(pairs: Iterable[Pair], metric: str, most: float, *, strict: bool = False) -> list[Verdict]:
    """Whether each pair's second is worse by more than `most`, in the unit of the figure.

    On the prompts that both have answered, the difference is a fact, so it decides; the interval says whether it would
    be so on others, too. `strict` also fails where the interval does not rule out a loss of more than `most`.
    """
    return [_verdict(pair, metric, most, strict) for pair in pairs if metric in pair.figures]


def _verdict(pair: Pair, metric: str, most: float, strict: bool) -> Verdict:
    told = pair.figures[metric].difference
    gain = Estimate(-told.value, -told.high, -told.low) if metric in LOWER_IS_BETTER else told
    if gain.value < -most - ROUNDING:
        sure = "surely" if gain.high < -most else "perhaps by chance of these prompts"
        return Verdict(pair, gain, False, f"worse by {-gain.value:.3f}, {sure}")
    if strict and gain.low < -most - ROUNDING:
        return Verdict(pair, gain, False, f"may be worse by {-gain.low:.3f} on other prompts")
    return Verdict(pair, gain, True, "")
