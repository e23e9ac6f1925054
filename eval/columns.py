"""Records as columns: what tables need of a run, some seventy bytes to a record, whatever the answers' lengths."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.asking import Tell
from eval.records import EXPERT, REGIMES, NotARun, Record, Regime

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


EVERY = 1000  # records between two signs of life


@dataclass(frozen=True)
class Asked:
    """What all records of an example have in common."""

    id: str
    task: str
    owners: tuple[str, ...]
    tags: tuple[str, ...]
    length: int
    metric: str


@dataclass(frozen=True)
class Columns:
    """`values` holds one array (n,) to a field of the records, in their order; -1 and NaN where there is nothing.

    examples  those that any record is about, in the order of their first one; the matrix's records count, too
    routers   names of rows; the matrix's are not among them
    """

    examples: tuple[Asked, ...]
    routers: tuple[str, ...]
    values: Mapping[str, NDArray[np.generic]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.values["router"])

    def __getitem__(self, name: str) -> Floats:
        """Any column, as numbers."""
        return self.values[name].astype(np.float64)

    def ints(self, name: str) -> Ints:
        return self.values[name].astype(np.int64)

    def of(self, regime: Regime) -> Columns:
        return self.where(self.values["regime"] == REGIMES.index(regime))

    def about(self, wanted: Sequence[bool] | Bools) -> Columns:
        """Only records of these examples (E,), as if there were no others."""
        return self.numbered(np.flatnonzero(np.asarray(wanted, bool)).tolist())

    def numbered(self, order: Sequence[int]) -> Columns:
        """Only records of these examples, which get the numbers that they have in `order`."""
        number = np.full(len(self.examples), -1, np.int64)
        number[list(order)] = np.arange(len(order))
        kept = self.where(number[self.ints("example")] >= 0)
        values = {**kept.values, "example": number[kept.ints("example")]}
        return replace(kept, examples=tuple(self.examples[each] for each in order), values=values)

    def renamed(self, names: Mapping[str, str], routers: Sequence[str]) -> Columns:
        """Only records of the routers that `names` has, under their new names, which are among `routers`."""
        places = {name: place for place, name in enumerate(routers)}
        number = np.array([places[names[each]] if each in names else -1 for each in self.routers] or [-1], np.int64)
        kept = self.where(number[self.ints("router")] >= 0)
        return replace(kept, routers=tuple(routers), values={**kept.values, "router": number[kept.ints("router")]})

    def joined(self, others: Sequence[Columns]) -> Columns:
        """With the records of others, of the same examples and routers, after its own."""
        every = [self, *others]
        return replace(self, values={name: np.concatenate([one.values[name] for one in every]) for name in self.values})

    def where(self, rows: Bools) -> Columns:
        """Only these records (n,)."""
        return replace(self, values={name: column[rows] for name, column in self.values.items()})


class _Numbers(dict[str, int]):
    """Names, numbered as they first appear."""

    def __missing__(self, name: str) -> int:
        self[name] = len(self)
        return self[name]


TYPES = {
    "router": "i",
    "regime": "b",
    "seed": "i",
    "example": "i",
    "score": "d",
    "rank": "i",
    "ranks": "b",
    "base": "d",
    "adapter": "i",
    "flops": "d",
    "latency": "d",
    "seconds": "d",
    "tokens": "i",
    "error": "b",
}


def columns_of(records: Iterable[Record], tell: Tell = lambda what, done, total: None, expected: int = 0) -> Columns:
    """Reads records once and forgets them. Raises NotARun where one is there twice."""
    values: dict[str, array[Any]] = {name: array(kind) for name, kind in TYPES.items()}
    appends = [column.append for column in values.values()]
    examples: dict[str, Asked] = {}
    numbers, routers, adapters = _Numbers(), _Numbers(), _Numbers()
    for read, record in enumerate(records):
        if read % EVERY == 0:
            tell("reading records", read, max(read, expected))
        if record.example not in examples:
            examples[record.example] = Asked(
                record.example, record.task, record.owners, record.tags, record.length, record.metric
            )
        number = numbers[record.example]
        if record.router.startswith(EXPERT):
            continue
        for append, value in zip(
            appends,
            (
                routers[record.router],
                REGIMES.index(record.regime),
                record.seed,
                number,
                _or_nan(record.score),
                record.rank,
                bool(record.ranked),
                np.nan if record.kind == "model" and not record.experts else record.kind == "base",
                adapters[record.adapter] if record.adapter else -1,
                _or_nan(record.flops),
                _or_nan(record.answer_ms) + (record.route_ms or 0),
                _or_nan(record.answer_ms) / 1000,
                record.tokens,
                record.error is not None,
            ),
            strict=True,
        ):
            append(value)
    found = Columns(tuple(examples.values()), tuple(routers), {name: np.array(each) for name, each in values.items()})
    _once(found)
    return found


def _or_nan(value: float | None) -> float:
    return np.nan if value is None else value


def _once(columns: Columns) -> None:
    router, regime, seed, example = (columns.ints(name) for name in ("router", "regime", "seed", "example"))
    seeds, seed_of = np.unique(seed, return_inverse=True)
    row = (router * len(REGIMES) + regime) * max(len(seeds), 1) + seed_of
    _, first = np.unique(row * max(len(columns.examples), 1) + example, return_index=True)
    if len(first) < len(columns):
        again = np.setdiff1d(np.arange(len(columns)), first)
        one = again[0]
        raise NotARun(
            f"{len(again)} records are there twice, the first of {columns.examples[example[one]].id} under "
            f"{columns.routers[router[one]]}, {REGIMES[regime[one]]}, seed {seed[one]}."
        )


def loads(adapters: Iterable[int], resident: int) -> int:
    """How often an adapter had to be loaded, if the `resident` that were used last stay; below 0: nothing is needed."""
    kept: OrderedDict[int, None] = OrderedDict()
    missed = 0
    for adapter in adapters:
        if adapter < 0:
            continue
        if adapter in kept:
            kept.move_to_end(adapter)
            continue
        missed += 1
        kept[adapter] = None
        if len(kept) > resident:
            kept.popitem(last=False)
    return missed
