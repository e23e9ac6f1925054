"""What a run has to ask: equal questions of different rows are one. What came of each, and what it scored."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, repeat
from typing import Any, TypeVar

from eval.asking import Ask, Reply, Tell
from eval.cache import Cache
from eval.examples import Example
from eval.extra import ExtraMissing
from eval.recipe import Recipe
from eval.scoring import CannotScore, Metric

T = TypeVar("T")
NOT_ASKED = "not asked"

CHUNK = 500  # questions whose answers are in memory at the same time
#: What is asked first: rows that others are held against, then what takes longer to build.
ORDER = ("base", "select", "model", "gate", "blend")


@dataclass(slots=True, eq=False)
class Question:
    """One recipe, one example. `score` None and no `error`: not asked yet, or nothing to be right about."""

    recipe: Recipe
    example: Example
    seed: int
    traced: bool
    key: str
    score: float | None = None
    error: str | None = None

    def ask(self, metric: Metric) -> Ask:
        """Where there is nothing to be right about, all that is wanted is who answers."""
        wanted = self.example.max_tokens if metric.needs != "nothing" else 1
        return Ask(
            recipe=self.recipe,
            prompt=self.example.prompt,
            max_tokens=wanted,
            stop=self.example.stop,
            choices=metric.asks(self.example),
            temperature=self.example.temperature,
            n=self.example.n,
            seed=self.seed,
            traced=self.traced,
        )


class Questions:
    """All questions of a run. `contents` are the digests of the adapters by name, `engine` is the engine's id."""

    def __init__(self, engine: str, contents: Mapping[str, str], metrics: Mapping[str, Metric], cache: Cache) -> None:
        self._engine = engine
        self._contents = contents
        self._metrics = metrics
        self._cache = cache
        self._all: dict[tuple[Recipe, str, int, bool], Question] = {}
        self._errors: dict[str, str] = {}  # why there is no answer, by key

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Question]:
        return iter(self._all.values())

    def needs_asking(self, recipe: Recipe, example: Example) -> bool:
        return recipe.kind == "model" or self._metrics[example.metric].needs != "nothing"

    def of(self, recipe: Recipe, example: Example, seed: int, traced: bool = False) -> Question | None:
        """The question of a row, which is counted when it is met first; None where nothing is asked."""
        if not self.needs_asking(recipe, example):
            return None
        seed = seed if example.temperature else 0  # greedy answers have none
        found = self._all.get((recipe, example.id, seed, traced))
        if found is None:
            found = Question(recipe, example, seed, traced, "")
            found.key = f"answer/{self.ask(found).key(self._engine, self._contents)}"
            self._all[recipe, example.id, seed, traced] = found
        return found

    def ask(self, question: Question) -> Ask:
        return question.ask(self._metrics[question.example.metric])

    def unanswered(self) -> list[Question]:
        """Those that the cache has no answer to, in the order in which they should be asked; one of those that share
        an answer."""
        left: dict[str, Question] = {}
        for some in chunks(self, CHUNK):
            known = self._cache.get_many(each.key for each in some)
            left.update((each.key, each) for each in some if each.key not in known)
        return sorted(left.values(), key=lambda each: ORDER.index(each.recipe.kind))

    def replies(self, questions: Iterable[Question]) -> dict[str, Reply]:
        """What the cache has, by key."""
        found = self._cache.get_many(each.key for each in questions)
        return {key: Reply.model_validate(value) for key, value in found.items()}

    def keep(self, question: Question, reply: Reply) -> None:
        """Answers; errors are not kept, so that another run asks again."""
        if reply.error is None:
            self._cache.put(question.key, reply.model_dump(mode="json", exclude_defaults=True))
        else:
            self._errors[question.key] = reply.error

    def score(self, tell: Tell) -> None:
        """Every answer. What runs programs is scored once: it takes seconds, and time decides about it."""
        done = 0
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for some in chunks(self, CHUNK):
                tell("scoring", done, len(self))
                replies = self.replies(some)
                outcomes = pool.map(self._scored, some, repeat(replies))
                for question, outcome in zip(some, outcomes, strict=True):
                    if isinstance(outcome, str):
                        question.error = outcome
                    else:
                        question.score = outcome
                done += len(some)
        tell("scoring", done, done)

    def _scored(self, question: Question, replies: Mapping[str, Reply]) -> float | str | None:
        """The score, None where there is nothing to score, or why there is none."""
        metric = self._metrics[question.example.metric]
        reply = replies.get(question.key)
        if reply is None:
            return self._errors.get(question.key, NOT_ASKED)
        if metric.needs == "nothing" or question.traced:
            return None
        key = score_key(question) if metric.needs == "code" else None
        if key is not None and (kept := self._cache.get(key)) is not None:
            return float(kept)
        try:
            score = metric.score(question.example, reply)
        except (CannotScore, ExtraMissing) as error:
            return str(error)
        if key is not None:
            self._cache.put(key, score)
        return score


def score_key(question: Question) -> str:
    told = [question.key, question.example.model_dump(mode="json")]
    return f"score/{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()}"


def unscorable(examples: Sequence[Example], metrics: Mapping[str, Metric], most: int = 20) -> list[str]:
    """Why examples cannot be scored by their metrics, one line to each."""
    problems: list[str] = []
    for example in examples:
        if example.metric not in metrics:
            known = ", ".join(metrics)
            problems.append(f"{example.id}: there is no metric '{example.metric}'; there are: {known}")
        elif why := metrics[example.metric].lacks(example):
            problems.append(f"{example.id}: {why}")
    more = [f"... and {len(problems) - most} more"] if len(problems) > most else []
    return problems[:most] + more


def chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while some := list(islice(iterator, size)):
        yield some


def adapter_of(recipe: Recipe, experts: Sequence[tuple[str, float]] = ()) -> str:
    """What an engine has to have loaded; a composite is the same whatever the weights, which travel with requests.

    `experts` are those that an endpoint which routes by itself says have answered.
    """
    if recipe.kind == "model":
        return "+".join(name if weight == 1 else f"{name}={weight:g}" for name, weight in experts)
    if recipe.kind == "base":
        return ""
    if recipe.kind == "select":
        return recipe.experts[0][0]
    told: dict[str, Any] = recipe.model_dump(mode="json")
    if recipe.kind == "gate":
        told["experts"] = recipe.names
    return f"{recipe.kind}:{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]}"
