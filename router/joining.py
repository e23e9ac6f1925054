"""Who would answer what if a proposed expert joined: a router's decisions before and after, on held-out samples.

This is the confusion delta by the served method itself, thresholds and all, for a maintainer to read before an expert
is promoted. `router.takeover` asks two simple rules instead, so that every registration can afford it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any

import numpy as np

from adapters_registry.expert import Expert
from router.encoder import Vectors
from router.held_out import FOLDS, part, without
from router.library import Library, Mask, build, sentence
from router.method import Method, Query, calibrated, decide, fitted
from router.methods import METHODS
from router.takeover import SAME
from router.text import BUDGET, shorten

#: Samples that suffice: no more folds are asked when there were so many.
ENOUGH = 1000


@dataclass(frozen=True)
class Row:
    """What becomes of the samples of one expert that were asked.

    right_before, right_after  that it answers itself
    lost       by itself before, by the newcomer after
    abstained  by itself before, by the base model after
    elsewhere  by itself before, by another old expert after
    gained     not by itself before, but after

    right_after = right_before - lost - abstained - elsewhere + gained
    """

    expert: str
    samples: int
    right_before: int
    right_after: int
    lost: int
    abstained: int
    elsewhere: int
    gained: int


@dataclass(frozen=True)
class Moved:
    """A sample that somebody else answers when the newcomer is there; None is the base model.

    expert  whose sample it is
    sample  its place in that expert's samples, from 0
    """

    expert: str
    sample: int
    text: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Own:
    """One of the newcomer's samples: who answers it now, and who would with the newcomer there."""

    sample: int
    text: str
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Joining:
    """rows   of every other expert with samples that were asked, in the order of their names
    moved  in the same order
    own    of the newcomer
    """

    name: str
    rows: tuple[Row, ...]
    moved: tuple[Moved, ...]
    own: tuple[Own, ...]

    @property
    def asked(self) -> int:
        """Samples of other experts."""
        return sum(row.samples for row in self.rows)

    @property
    def top1_before(self) -> float:
        """Share of these that their own expert answers; 0 when none was asked."""
        return sum(row.right_before for row in self.rows) / max(self.asked, 1)

    @property
    def top1_after(self) -> float:
        return sum(row.right_after for row in self.rows) / max(self.asked, 1)

    @property
    def lost(self) -> int:
        return sum(row.lost for row in self.rows)

    @property
    def gained(self) -> int:
        return sum(row.gained for row in self.rows)

    @property
    def abstained(self) -> int:
        return sum(row.abstained for row in self.rows)

    @property
    def reached(self) -> float:
        """Share of the newcomer's own samples that it would answer."""
        return sum(each.after == self.name for each in self.own) / max(len(self.own), 1)

    def json(self) -> dict[str, Any]:
        return asdict(self) | {
            "asked": self.asked,
            "top1_before": self.top1_before,
            "top1_after": self.top1_after,
            "lost": self.lost,
            "gained": self.gained,
            "abstained": self.abstained,
            "reached": self.reached,
        }


def joining(
    library: Library,
    newcomer: Expert,
    vectors: Vectors,
    method: str = "fusion",
    settings: Mapping[str, Any] | None = None,
    *,
    encoder: str = "",
    among: Mask | None = None,
    most: int = 20,
) -> Joining:
    """What changes when `newcomer` with the embeddings (n, dim) of its samples joins the experts of `library`.

    An older version of it makes room; is it there itself, "before" is without it. `among` (K,) are the experts that it
    competes with, all if not given: others are neither asked nor told of. Of each, the first `most` samples are asked,
    held out in folds (`router.held_out`), and of a large library only as many folds as it takes to ask ENOUGH. Copies
    do not vote either: the newcomer's of what is asked, and others' of what is asked of the newcomer's. An expert's
    only sample is not asked. `encoder` is the id under which calibrations in the library were made.
    """
    kind = METHODS[method]
    chosen = kind.Settings.model_validate(dict(settings or {}))
    calibration = library.learned.calibration.get(method)
    names = {e.name for k, e in enumerate(library.experts) if among is None or among[k]} | {newcomer.name}
    before, after = sides(library, newcomer, vectors)
    own: list[Own] = []
    others: list[Moved] = []  # all that are asked, moved or not
    for asked in folds(after, names, most):
        found, previous = [], None
        for side in (before, after):
            there = part(side, kept(side, asked, newcomer))
            previous = fitted(kind, there, chosen, previous)
            served = calibrated(previous, calibration, chosen, encoder)
            found.append(answers(method, served, there, names, asked))
        for each, one, other in zip(asked, *found, strict=True):
            if each.expert.name == newcomer.name:
                own.append(Own(each.number, each.text, one, other))
            else:
                others.append(Moved(each.expert.name, each.number, each.text, one, other))
    others.sort(key=lambda each: (each.expert, each.sample))
    return Joining(
        newcomer.name,
        rows=tuple(row(name, list(group), newcomer.name) for name, group in groupby(others, attrgetter("expert"))),
        moved=tuple(each for each in others if each.before != each.after),
        own=tuple(sorted(own, key=attrgetter("sample"))),
    )


@dataclass(frozen=True, eq=False)
class Asked:
    """The `number`-th of an expert's samples, and its row among those that stand for the expert."""

    expert: Expert
    number: int
    row: int
    text: str
    vector: Vectors  # (dim,)


def sides(library: Library, newcomer: Expert, vectors: Vectors) -> tuple[Library, Library]:
    """The library without the newcomer, with its older version if there is one, and the library after it joined."""
    before = without(library, np.array([k for k, e in enumerate(library.experts) if e.id != newcomer.id], np.int64))
    after = build(
        [*(expert for expert in before.experts if expert.name != newcomer.name), newcomer],
        lambda texts: np.zeros((0, library.dim), np.float32),  # nothing is new
        library.dim,
        generation=library.generation,
        max_rank=library.max_rank,
        stored={newcomer.id: vectors},
        previous=before,
        learned=library.learned,
        head=library.head,
    )
    return before, after


def folds(library: Library, names: Collection[str], most: int) -> Iterator[list[Asked]]:
    """Every FOLDS-th of the first `most` samples of each of these experts."""
    total = 0
    for fold in range(FOLDS):
        asked = []
        for expert, texts, rows in zip(library.experts, library.texts, library.registered, strict=True):
            numbers = [number for number, sample in enumerate(expert.samples) if sample.prompt.strip()]
            if expert.name in names and len(numbers) == len(rows) >= 2:
                out = range(fold, min(len(rows), most), FOLDS)
                asked += [Asked(expert, numbers[j], j, texts[j], rows[j]) for j in out]
        if asked:
            yield asked
        total += len(asked)
        if total >= ENOUGH:
            return


def kept(library: Library, asked: Sequence[Asked], newcomer: Expert) -> list[list[int]]:
    """The rows of each expert that vote meanwhile."""
    out: dict[str, set[int]] = {}
    for each in asked:
        out.setdefault(each.expert.id, set()).add(each.row)
    everything = sentence(np.array([each.vector for each in asked]), library.head)  # (m, head)
    own = everything[[each.expert.id == newcomer.id for each in asked]]
    voting = []
    for expert, rows in zip(library.experts, library.sentences, strict=True):
        copies = rows @ (everything if expert.name == newcomer.name else own).T >= SAME  # (n, m)
        held = out.get(expert.id, set())
        voting.append([j for j in range(len(rows)) if j not in held and not copies[j].any()])
    return voting


def answers(
    name: str, method: Method, library: Library, names: Collection[str], asked: Sequence[Asked]
) -> list[str | None]:
    """Who answers each: the expert, of several the first; None: the base model."""
    among = np.array([expert.name in names for expert in library.experts], bool)
    queries = (Query(shorten(each.text.strip(), BUDGET), each.vector, among) for each in asked)
    decisions = [decide(name, method, library, query, 1) for query in queries]
    return [decision.experts[0].expert if decision.experts else None for decision in decisions]


def row(expert: str, samples: Sequence[Moved], newcomer: str) -> Row:
    left = [each for each in samples if each.before == expert != each.after]
    return Row(
        expert,
        samples=len(samples),
        right_before=sum(each.before == expert for each in samples),
        right_after=sum(each.after == expert for each in samples),
        lost=sum(each.after == newcomer for each in left),
        abstained=sum(each.after is None for each in left),
        elsewhere=sum(each.after not in (newcomer, None) for each in left),
        gained=sum(each.before != expert == each.after for each in samples),
    )
