"""The rows that every run has: what routers are held against (docs/evaluation.md).

`fixed` says what to ask: of the base model, of every expert (the matrix), of random experts, of all together. What
those answers scored then gives the rest, without a question: `scored`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from math import inf
from random import Random
from statistics import fmean
from typing import TypeVar

from eval.deciding import Names, Planned, grouped
from eval.examples import Example
from eval.recipe import Recipe, uniform
from eval.records import EXPERT, REFERENCES, REGIMES, Record, Regime, RouterInfo

K = TypeVar("K", bound=Hashable)

#: Adapters with random weights, as an engine has them (`eval.random_weights`).
RANDOM: Names = tuple(f"random-weights-{k}" for k in range(4))
#: Experts that a request may name.
MOST = 64


def infos(names: Iterable[str] = ()) -> list[RouterInfo]:
    """What the rows are, the matrix's for these experts."""
    rows = [RouterInfo(name=name, kind="reference", family="reference", about=REFERENCES[name]) for name in REFERENCES]
    return rows + [
        RouterInfo(name=f"{EXPERT}{name}", kind="expert", family="expert", about=f"{name} on every prompt")
        for name in names
    ]


def fixed(
    names: Sequence[str],
    examples: Sequence[Example],
    regimes: Sequence[Regime] = REGIMES,
    seeds: Sequence[int] = (0,),
    random_weights: Sequence[str] = RANDOM,
) -> Iterator[Planned]:
    """What to ask for the references, and for the matrix; `names` are the experts'.

    `random_weights` are the engine's adapters with random weights; where it has none the row is left out.
    """
    for regime in regimes:
        for owners, some in grouped(examples, regime):
            allowed = sorted(set(names) - set(owners))
            for example in some:
                yield from _fixed(regime, allowed, example, seeds, random_weights)
    for name in sorted(names):
        for example in examples:
            if example.owners:
                row = f"{EXPERT}{name}"
                yield Planned(row, "in-distribution", seeds[0], example.id, Recipe.expert(name))


def _fixed(
    regime: Regime, allowed: Sequence[str], example: Example, seeds: Sequence[int], random_weights: Sequence[str]
) -> Iterator[Planned]:
    def row(router: str, recipe: Recipe, seed: int = seeds[0]) -> Planned:
        return Planned(router, regime, seed, example.id, recipe)

    yield row("base", Recipe())
    if len(set(example.owners)) < 2:
        yield row("oracle", Recipe.expert(example.owners[0]) if example.owners else Recipe())
    yield row("uniform", uniform(together(allowed)) if allowed else Recipe())
    for seed in seeds:
        yield row("random", Recipe.expert(drawn(allowed, seed, example)) if allowed else Recipe(), seed)
        if random_weights:
            yield row("random-weights", Recipe.expert(drawn(random_weights, seed, example)), seed)


def together(allowed: Sequence[str]) -> list[str]:
    """All of these, or where they are too many for one request a sample, much the same for every prompt."""
    return sorted(sorted(allowed, key=lambda name: Random(name).random())[:MOST])


def drawn(among: Sequence[str], seed: int, example: Example) -> str:
    """One of these, equally likely each, the same in every process."""
    return Random(f"{seed} {example.id}").choice(among)


def scored(
    records: Iterable[Record],
    examples: Sequence[Example],
    regimes: Sequence[Regime] = REGIMES,
) -> Iterator[Record]:
    """The references that scores decide: the oracle of compositions, best-single and best-per-query.

    `records` are at least those of the base model and of the matrix, in-distribution; others do not matter. What they
    lack is passed over: the result is not complete then either.

    oracle          of a prompt with several owners: the owner that does best on the prompt's task
    best-single     the expert with the best normalised score over all prompts on which it is allowed; the first of
                    them that is allowed on a prompt answers it
    best-per-query  the best record of the base model and the allowed experts on each prompt
    Ties: the base model first, then by name.
    """
    base: dict[str, Record] = {}
    asked: dict[str, dict[str, Record]] = {}  # example -> expert -> record
    for record in records:
        if record.regime != "in-distribution":
            continue
        if record.router == "base":
            base[record.example] = record
        elif record.router.startswith(EXPERT):
            asked.setdefault(record.example, {})[record.router.removeprefix(EXPERT)] = record
    matrix = Matrix(examples, asked)
    for regime in regimes:
        singles = matrix.singles(regime)
        for owners, some in grouped(examples, regime):
            single = next((name for name in singles if name not in owners), None)
            for example in some:
                if example.id in base:
                    yield from _scored(matrix, example, base[example.id], owners, single, regime)


def _scored(
    matrix: Matrix, example: Example, base: Record, gone: Sequence[str], single: str | None, regime: Regime
) -> Iterator[Record]:
    def row(router: str, record: Record) -> Record:
        return record.model_copy(update={"router": router, "regime": regime})

    asked = matrix.asked.get(example.id, {})
    if len(set(example.owners)) > 1 and (owner := matrix.oracle(example)) in asked:
        yield row("oracle", asked[owner])
    if single is None:
        yield row("best-single", base)
    elif not example.owners:  # nobody was asked
        yield row("best-single", base.model_copy(update=matrix.stand_in(single)))
    elif single in asked:
        yield row("best-single", asked[single])
    among = [base, *(asked[name] for name in sorted(asked) if name not in gone)]
    told = [record for record in among if record.score is not None]
    yield row("best-per-query", max(told or [base], key=lambda record: record.score or 0.0))


class Matrix:
    """What every expert scored on every prompt that has an owner; `asked` are records by example and expert."""

    def __init__(self, examples: Sequence[Example], asked: Mapping[str, Mapping[str, Record]]) -> None:
        self.asked = asked
        self._examples = [example for example in examples if example.owners]
        self._names = sorted({name for row in asked.values() for name in row})
        self._best: dict[tuple[str, frozenset[str]], str] = {}
        for key, some in _by(self._examples, lambda example: (example.task, frozenset(example.owners))).items():
            self._best[key] = min(key[1], key=lambda owner: (-_mean(self._scores(owner, some), -inf), owner))

    def oracle(self, example: Example) -> str:
        """The example's owner, of several the one that does best on the task's prompts with the same owners."""
        return self._best[example.task, frozenset(example.owners)]

    def singles(self, regime: Regime) -> list[str]:
        """The experts, best first, by their normalised score on the prompts that they may answer in a regime.

        Where no task has an oracle above 0, by the mean over tasks of what they score.
        """
        tasks = _by(self._examples, lambda example: example.task)
        oracle = {
            task: _mean([each for example in some for each in self._scores(self.oracle(example), [example])], 0.0)
            for task, some in tasks.items()
        }
        tell = {task for task, score in oracle.items() if score > 0}

        def figure(name: str) -> float:
            shares = []
            for task in tell or tasks:
                allowed = [e for e in tasks[task] if regime == "in-distribution" or name not in e.owners]
                if scores := self._scores(name, allowed):
                    shares.append(fmean(scores) / (oracle[task] if tell else 1))
            return _mean(shares, -inf)

        return sorted(self._names, key=lambda name: (-figure(name), name))

    def stand_in(self, name: str) -> dict[str, object]:
        """What a record says where this expert would have answered a prompt that nobody was asked."""
        other = next(row[name] for row in self.asked.values() if name in row)
        return {key: getattr(other, key) for key in ("kind", "experts", "adapter", "flops")}

    def _scores(self, name: str, examples: Iterable[Example]) -> list[float]:
        found = (self.asked.get(example.id, {}).get(name) for example in examples)
        return [record.score for record in found if record is not None and record.score is not None]


def _by(examples: Iterable[Example], key: Callable[[Example], K]) -> dict[K, list[Example]]:
    groups: dict[K, list[Example]] = {}
    for example in examples:
        groups.setdefault(key(example), []).append(example)
    return groups


def _mean(values: Sequence[float], nothing: float) -> float:
    return fmean(values) if values else nothing
