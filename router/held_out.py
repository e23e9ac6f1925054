"""What a routing method says of prompts that it was not fitted to: cross-validation over a library's own samples.

Prompts that no expert is for have to be made up too. Taking away one expert is not enough: a registry is full of
near-duplicates, and the prompts of one are answered just as well by the next. So a whole region is taken away, the
experts nearest to an anchor, and the prompts of the innermost ones stand in for prompts out of domain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from router.encoder import Vectors
from router.library import Library
from router.method import Method, MethodSettings, Query, fitted
from router.text import BUDGET, shorten

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
T = TypeVar("T")

FOLDS = 5
# Measured on ni150 instance (docs/experiments.md).
ANCHORS = 12  # regions that are taken away, one after the other
REGION = 0.4  # the share of all experts in one
INSIDE = 0.02  # the share of all experts, at least one, whose prompts then stand for prompts out of domain

#: Told of every fit: how many are done, and of how many.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class HeldOut:
    """N prompts.

    scores  (N, n) by expert, -inf for those that were not considered
    limits  (N,) the threshold of the expert with the best score, 0 for methods that have none
    own     (N,) the expert that a prompt belongs to, -1 for prompts out of domain
    part    (N,) prompts of one part were held out together
    """

    scores: Floats
    limits: Floats
    own: Integers
    part: Integers

    def __len__(self) -> int:
        return len(self.own)

    def take(self, which: NDArray[np.bool_]) -> HeldOut:
        return HeldOut(self.scores[which], self.limits[which], self.own[which], self.part[which])


@dataclass(frozen=True, eq=False)
class Round:
    """Prompts (text, embedding (dim,), whose) that were not in the library they are asked of.

    library  makes that library, when its turn comes: all at once would be many times the whole one
    columns  (n',) which experts of the whole library are in this one
    """

    library: Callable[[], Library]
    columns: Integers
    asked: Sequence[tuple[str, Vectors, int]]
    part: int


def hold_out(
    kind: type[Method],
    settings: MethodSettings,
    library: Library,
    *,
    outside: Sequence[tuple[str, Vectors]] = (),
    regions: bool = True,
    tell: Progress = lambda done, of: None,
) -> HeldOut:
    """Scores of each expert's samples by methods fitted without them, and of prompts out of domain.

    The latter are those `outside`, texts and embeddings (dim,), and with `regions` the samples of experts that were
    taken away. An expert's only sample is never held out, nor what was learned for an expert. Raises ValueError when
    there is nothing to ask.
    """
    planned = [*_folds(library), *(_regions(library) if regions else ()), *_outside(library, outside)]
    if not planned:
        raise ValueError("No expert has two samples, so none can be held out to measure with.")
    measured = []
    for done, each in enumerate(planned, start=1):
        measured.append(_measure(kind, settings, each, len(library)))
        tell(done, len(planned))
    return HeldOut(
        np.concatenate([each.scores for each in measured]),
        np.concatenate([each.limits for each in measured]),
        np.concatenate([each.own for each in measured]),
        np.concatenate([each.part for each in measured]),
    )


def _measure(kind: type[Method], settings: MethodSettings, each: Round, n: int) -> HeldOut:
    library = each.library()
    method = fitted(kind, library, settings)
    everyone = np.ones(len(library), bool)
    scores: Floats = np.full((len(each.asked), n), -np.inf)
    limits: Floats = np.zeros(len(each.asked))
    for row, (text, vector, _) in enumerate(each.asked):
        found = method.score(Query(shorten(text.strip(), BUDGET), vector, everyone))
        found = np.where(np.isfinite(found), found, -np.inf)
        scores[row, each.columns] = found
        if method.thresholds is not None:
            limits[row] = method.thresholds[int(found.argmax())]
    own = np.array([whose for _, _, whose in each.asked], np.int64)
    return HeldOut(scores, limits, own, np.full(len(own), each.part))


def _folds(library: Library) -> Iterator[Round]:
    """Every `FOLDS`-th registered sample of every expert, asked of a library without them."""
    registered = library.registered or library.prototypes
    for fold in range(FOLDS):
        rows, asked = [], []
        for k, (texts, vectors) in enumerate(zip(library.texts, library.prototypes, strict=True)):
            lent = len(registered[k]) if len(texts) >= len(registered[k]) >= 2 else 0
            out = range(fold, lent, FOLDS)
            asked += [(texts[j], vectors[j], k) for j in out]
            rows.append([j for j in range(len(vectors)) if j not in out])
        if asked:
            yield Round(partial(part, library, rows), np.arange(len(library)), asked, fold)


def _regions(library: Library) -> Iterator[Round]:
    for number, (inner, gone) in enumerate(taken_away(library)):
        kept = np.setdiff1d(np.arange(len(library)), gone)
        lent = ((library.texts[k], library.prototypes[k]) for k in inner)
        asked = [(text, vector, -1) for pair in lent for text, vector in zip(*pair, strict=False)]
        if asked:
            yield Round(partial(without, library, kept), kept, asked, number % FOLDS)


def _outside(library: Library, prompts: Sequence[tuple[str, Vectors]]) -> Iterator[Round]:
    for fold in range(min(FOLDS, len(prompts))):
        asked = [(text, vector, -1) for text, vector in prompts[fold::FOLDS]]
        yield Round(lambda: library, np.arange(len(library)), asked, fold)


def part(library: Library, rows: Sequence[Sequence[int]]) -> Library:
    """The same experts with some of their samples: `rows[k]` of expert k."""
    texts = tuple(
        tuple(group[j] for j in kept if j < len(group)) for group, kept in zip(library.texts, rows, strict=True)
    )
    prototypes = tuple(group[list(kept)] for group, kept in zip(library.prototypes, rows, strict=True))
    keys = tuple(f"{key}/{','.join(map(str, kept))}" for key, kept in zip(library.keys, rows, strict=True))
    return replace(library, texts=texts, prototypes=prototypes, registered=prototypes, keys=keys)


def without(library: Library, kept: Integers) -> Library:
    """Only these experts, in their order."""

    def pick(each: tuple[T, ...]) -> tuple[T, ...]:
        return tuple(each[k] for k in kept) if each else each

    return replace(
        library,
        experts=pick(library.experts),
        texts=pick(library.texts),
        prototypes=pick(library.prototypes),
        keys=pick(library.keys),
        registered=pick(library.registered),
        refused=pick(library.refused),
    )


def taken_away(library: Library) -> Iterator[tuple[Integers, Integers]]:
    """Regions of the map of experts: (whose prompts are then out of domain, all experts that go).

    Anchors are the experts farthest from each other; two experts at least stay.
    """
    n = len(library)
    size = min(max(1, round(REGION * n)), n - 2)
    if size < 1:
        return
    cosines = _means(library) @ _means(library).T  # (n, n)
    for anchor in farthest(cosines, min(ANCHORS, n)):
        near = np.argsort(-cosines[anchor], kind="stable")
        near = np.concatenate([[anchor], near[near != anchor]])
        yield near[: max(1, round(INSIDE * n))], near[:size]


def farthest(cosines: Floats, count: int) -> list[int]:
    """Items chosen one after the other, each as far as can be from those before; the first is the most central."""
    chosen = [int(cosines.sum(axis=1).argmax())]
    nearest = cosines[chosen[0]].copy()
    while len(chosen) < count:
        nearest[chosen] = np.inf
        chosen.append(int(nearest.argmin()))
        nearest = np.minimum(nearest, cosines[chosen[-1]])
    return chosen


def _means(library: Library) -> Floats:
    """(n, head) each expert's mean direction, zero for one without vectors."""
    totals = np.stack([group.sum(axis=0, dtype=np.float64) for group in library.sentences])
    scaled: Floats = totals / np.maximum(np.linalg.norm(totals, axis=1, keepdims=True), 1e-9)
    return scaled
