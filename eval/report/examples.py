"""The prompts that a reader should see: where a router did worse than the oracle, the worst first, of many tasks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from eval.examples import Example
from eval.records import REGIMES, Record, Regime

MOST = 240  # examples in a report
EACH = 8  # of a router in a regime, at most
LENGTH = 600  # characters of a text that are shown


@dataclass(frozen=True)
class Answer:
    who: str
    text: str
    score: float


@dataclass(frozen=True)
class Lost:
    """One prompt; `right`: answers that would do, as far as the run kept them."""

    example: str
    task: str
    tags: tuple[str, ...]
    prompt: str
    right: tuple[str, ...]
    router: Answer
    oracle: Answer

    @property
    def loss(self) -> float:
        return self.oracle.score - self.router.score


@dataclass(frozen=True)
class Losses:
    """Of a router in a regime: `count` prompts of `compared` on which the oracle is better, the `worst` of them."""

    router: str
    regime: Regime
    count: int
    compared: int
    worst: tuple[Lost, ...]

    def json(self) -> dict[str, Any]:
        return asdict(self)


class Oracle:
    """What the oracle answered, by regime and example: its first record with a score."""

    def __init__(self) -> None:
        self._answers: dict[tuple[Regime, str], Answer] = {}

    def add(self, record: Record) -> None:
        if record.router == "oracle" and record.score is not None:
            self._answers.setdefault((record.regime, record.example), answer(record))

    def get(self, record: Record) -> Answer | None:
        return self._answers.get((record.regime, record.example))


def losses(
    records: Iterable[Record], oracle: Oracle, routers: Iterable[str], examples: Mapping[str, Example]
) -> list[Losses]:
    """One entry to a router and regime, in the order of the routers."""
    wanted = {name: place for place, name in enumerate(routers)}
    counts: dict[tuple[Regime, str], list[int]] = defaultdict(lambda: [0, 0])
    worst: dict[tuple[Regime, str], list[tuple[float, str, Record]]] = defaultdict(list)
    for record in records:
        best = oracle.get(record)
        if record.router not in wanted or record.score is None or best is None:
            continue
        key = record.regime, record.router
        counts[key][1] += 1
        if record.score < best.score:
            counts[key][0] += 1
            worst[key].append((record.score - best.score, record.example, record))
            if len(worst[key]) > 40 * EACH:
                worst[key] = _chosen(worst[key], 20 * EACH)
    each = max(2, min(EACH, MOST // max(len(worst), 1)))
    return [
        Losses(
            router,
            regime,
            lost,
            compared,
            tuple(_lost(record, oracle, examples) for _, _, record in _chosen(worst[regime, router], each)),
        )
        for (regime, router), (lost, compared) in sorted(
            counts.items(), key=lambda item: (wanted[item[0][1]], REGIMES.index(item[0][0]))
        )
    ]


def _chosen(found: Iterable[tuple[float, str, Record]], most: int) -> list[tuple[float, str, Record]]:
    """The worst of every task, then the second of every task, and so on; among these the worst first."""
    seen: dict[str, int] = defaultdict(int)
    turns = []
    for loss, example, record in sorted(found, key=lambda each: (each[0], each[1], each[2].seed)):
        turns.append((seen[record.task], loss, example, record.seed, record))
        seen[record.task] += 1
    chosen = sorted(turns, key=lambda each: each[:4])[:most]
    return [(loss, example, record) for _, loss, example, _, record in chosen]


def _lost(record: Record, oracle: Oracle, examples: Mapping[str, Example]) -> Lost:
    best = oracle.get(record)
    assert best is not None
    example = examples.get(record.example)
    return Lost(
        example=record.example,
        task=record.task,
        tags=record.tags,
        prompt=cut(f"{example.prompt.system}\n{example.prompt.text}".strip()) if example else "",
        right=tuple(cut(text) for text in _right(example)) if example else (),
        router=answer(record),
        oracle=best,
    )


def _right(example: Example) -> Iterator[str]:
    yield from example.answers[:5]
    if not example.answers and example.gold is not None and example.gold < len(example.choices):
        yield example.choices[example.gold]


def answer(record: Record) -> Answer:
    assert record.score is not None
    return Answer(who(record), cut(record.answer), record.score)


def who(record: Record) -> str:
    """`sql 0.7 + poetry 0.3`, the base model, or the first of many."""
    if not record.experts:
        return "base model" if record.kind == "base" else record.adapter or record.kind
    heavy = sorted(record.experts, key=lambda each: (-abs(each[1]), each[0]))
    if len(heavy) == 1 and heavy[0][1] == 1:
        return heavy[0][0]
    told = " + ".join(f"{name} {weight:.2g}" for name, weight in heavy[:3])
    return told + (f" + {len(heavy) - 3} more" if len(heavy) > 3 else "")


def cut(text: str) -> str:
    """At most so much of it as is shown, and how much more there is."""
    return text if len(text) <= LENGTH else f"{text[:LENGTH]} … ({len(text) - LENGTH:,} more characters)"
