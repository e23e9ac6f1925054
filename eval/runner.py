"""Runs a suite: decides, asks what is not known, scores, and writes down what came of every prompt under every row.

Nothing is asked before everything is decided, so that times of decisions are not those of a busy machine, and that no
engine starts where all answers are known already.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.asking import Engine, EngineGone, Reply, Tell
from eval.cache import Cache
from eval.deciding import Planned, grouped, plan
from eval.examples import Example
from eval.questions import CHUNK, NOT_ASKED, Question, Questions, adapter_of, chunks, unscorable
from eval.recipe import Recipe
from eval.records import EXPERT, ExpertInfo, Record, RouterInfo, Run, TaskInfo, write_run
from eval.references import fixed, infos, scored
from eval.scoring import scorers
from eval.scoring.code import refused

if TYPE_CHECKING:
    from adapters_registry.expert import Expert
    from eval.encodings import Remembering
    from eval.suite import RouterEntry, Suite

TRACED = 3  # prompts of each gate whose traces are kept
ANSWER = 2000  # characters of an answer that a record shows
BATCH = 10_000  # questions that an engine is given at a time

OpenEngine = Callable[[], AbstractAsyncContextManager[Engine]]
Key = tuple[str, str]


class BadRun(Exception):
    """`problems` say why the suite cannot be run as it is, one line to each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))


@dataclass(frozen=True)
class Setup:
    """Everything that a run is made of.

    random     digests of the adapters with random weights that the engine has, by name
    engine_id  of the engine (`eval.asking.Engine.id`), which may not have to be started
    flops      of one token through a recipe
    resident   adapters that the engine keeps loaded
    max_rank   of the engine; None: unknown
    parameters  of each adapter, by name
    settings   what else a reader of the run should know
    """

    suite: Suite
    experts: Sequence[Expert]
    examples: Sequence[Example]
    tasks: Sequence[TaskInfo]
    encoder: Remembering
    engine_id: str
    random: Mapping[str, str] = field(default_factory=dict)
    flops: Callable[[Recipe], float | None] = lambda recipe: None
    parameters: Mapping[str, int] = field(default_factory=dict)
    resident: int = 64
    max_rank: int | None = None
    minutes: float | None = None
    allow_code: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)


def run(setup: Setup, open_engine: OpenEngine, cache: Cache, folder: Path, tell: Tell) -> Run:
    """Blocks until `folder` has the run. What is in the cache is neither decided nor asked again.

    A run that ends early, by its time limit or as the engine goes, is written as far as it came, and says what it
    lacks.
    Raises BadRun; EngineGone when not one answer came.
    """
    deadline = time.monotonic() + setup.minutes * 60 if setup.minutes else None
    runner = Runner(setup, cache, tell)
    runner.prepare()
    ended = runner.ask(open_engine, deadline)
    runner.questions.score(tell)
    cache.flush()
    return runner.write(folder, ended)


class Runner:
    """The steps of `run`."""

    def __init__(self, setup: Setup, cache: Cache, tell: Tell) -> None:
        self.setup = setup
        self._metrics = scorers(allow_code=setup.allow_code)
        if problems := unscorable(setup.examples, self._metrics):
            raise BadRun(problems)
        code = any(self._metrics[each.metric].needs == "code" for each in setup.examples)
        if code and (refusal := refused(setup.allow_code)) is not None:
            raise BadRun([refusal])
        contents = {each.name: each.digest for each in setup.experts} | dict(setup.random)
        self.questions = Questions(setup.engine_id, contents, self._metrics, cache)
        self._cache = cache
        self._tell = tell
        self._examples = {example.id: example for example in setup.examples}
        self._traced: dict[str, dict[str, Question]] = {}  # row -> example -> question
        self._expected = 0

    def planned(self, tell: Tell = lambda what, done, total: None) -> Iterator[Planned]:
        """Every row's recipe for every example, always in the same order."""
        setup, suite = self.setup, self.setup.suite
        names = [expert.name for expert in setup.experts]
        yield from fixed(names, setup.examples, suite.regimes, suite.seeds, sorted(setup.random))
        yield from plan(
            suite.routers,
            setup.experts,
            setup.examples,
            suite.regimes,
            suite.seeds,
            self._cache,
            tell,
            encoder=setup.encoder,
            max_rank=setup.max_rank,
        )

    def prepare(self) -> None:
        """Decide everything."""
        for each in self.planned(self._tell):
            self._expected += 1
            example = self._examples[each.example_id]
            self.questions.of(each.recipe, example, each.seed)
            if each.recipe.kind == "gate" and example.owners and each.regime == "in-distribution":
                self._trace(each, example)
        for regime in self.setup.suite.regimes:
            for _, some in grouped(self.setup.examples, regime):
                self._expected += sum(3 if len(set(each.owners)) > 1 else 2 for each in some)
        self._cache.flush()

    def _trace(self, each: Planned, example: Example) -> None:
        """One prompt of each task, until there are enough."""
        traced = self._traced.setdefault(each.router, {})
        if len(traced) < TRACED and example.task not in {self._examples[known].task for known in traced}:
            question = self.questions.of(each.recipe, example, each.seed, traced=True)
            if question is not None:
                traced[example.id] = question

    def ask(self, open_engine: OpenEngine, deadline: float | None) -> str | None:
        """Why not everything was asked that had to be, if so."""
        left = self.questions.unanswered()
        if not left:
            return None
        total, known = len(self.questions), len(self.questions) - len(left)
        progress = Progress(self._tell, known, total)
        try:
            asyncio.run(self._asked(open_engine, left, deadline, progress))
        except TimeoutError:
            limit = self.setup.minutes or 0
            why = f"the time limit of {limit:g} minutes came"
        except EngineGone as error:
            if progress.answered == 0:
                raise
            why = str(error)
        else:
            return None
        finally:
            self._cache.flush()
        return f"{total - progress.done} of {total} questions were not asked: {why}"

    async def _asked(
        self, open_engine: OpenEngine, left: Sequence[Question], deadline: float | None, progress: Progress
    ) -> None:
        """Raises TimeoutError, EngineGone."""
        end = None if deadline is None else asyncio.get_running_loop().time() + deadline - time.monotonic()
        async with asyncio.timeout_at(end), open_engine() as engine:
            await asyncio.sleep(0)  # where time is up already
            for some in chunks(left, BATCH):
                asked = {self.questions.ask(each): each for each in some}
                async for ask, reply in engine.answers(list(asked)):
                    self.questions.keep(asked[ask], reply)
                    progress.advance(reply)

    # Records

    def records(self) -> Iterator[Record]:
        """In the order of tables: references, the matrix, routers."""
        matrix: list[Record] = []
        for record in self._recorded(self.planned()):
            if record.router.startswith(EXPERT):
                matrix.append(record)
            elif record.router == "base" and record.regime == self.setup.suite.regimes[0]:  # the same in all of them
                matrix.append(record.model_copy(update={"regime": "in-distribution"}))
            yield record
        yield from scored(matrix, self.setup.examples, self.setup.suite.regimes)

    def _recorded(self, planned: Iterable[Planned]) -> Iterator[Record]:
        for some in chunks(planned, CHUNK):
            asked = [
                (each, self.questions.of(each.recipe, self._examples[each.example_id], each.seed)) for each in some
            ]
            replies = self.questions.replies(question for _, question in asked if question is not None)
            for each, question in asked:
                yield self._record(each, question, replies.get(question.key) if question is not None else None)

    def _record(self, each: Planned, question: Question | None, reply: Reply | None) -> Record:
        example, recipe = self._examples[each.example_id], each.recipe
        told: dict[str, Any] = {
            "kind": recipe.kind,
            "experts": recipe.experts,
            "ranked": each.ranked,
            "rank": each.rank,
            "confidence": each.confidence,
            "route_ms": each.route_ms,
            "adapter": adapter_of(recipe),
            "flops": self.setup.flops(recipe),
        }
        if question is not None:
            told |= {"score": question.score, "error": question.error}
        if reply is not None:
            told |= {
                "answer": reply.text[:ANSWER],
                "answer_ms": reply.seconds * 1e3,
                "prompt_tokens": reply.prompt_tokens,
                "tokens": reply.tokens,
            }
        if recipe.kind == "model":
            told |= self._answered_by(recipe, example, reply)
        elif recipe.gate == "probe" and reply is not None and reply.experts:  # it only finds who answers
            answering = Recipe.blend(dict(reply.experts))
            told |= {"experts": reply.experts, "flops": self.setup.flops(answering), "adapter": adapter_of(answering)}
        return Record(
            router=each.router,
            regime=each.regime,
            seed=each.seed,
            example=example.id,
            task=example.task,
            owners=example.owners,
            tags=example.tags,
            length=len(example.prompt.text),
            metric=example.metric,
            **told,
        )

    def _answered_by(self, recipe: Recipe, example: Example, reply: Reply | None) -> dict[str, Any]:
        """What an endpoint that routes by itself said about it; a stranger says nothing."""
        experts = (reply.experts if reply is not None else None) or ()
        names = [name for name, _ in experts]
        kind = "blend" if len(experts) > 1 else "select" if experts else "base"
        if reply is None or reply.experts is None:
            kind = "model"
        return {
            "kind": kind,
            "experts": experts,
            "ranked": tuple(names[:5]),
            "rank": min((names.index(owner) + 1 for owner in example.owners if owner in names), default=0),
            "confidence": reply.confidence if reply else None,
            "route_ms": reply.route_ms if reply else None,
            "adapter": adapter_of(recipe, experts),
            "flops": self.setup.flops(Recipe.blend(dict(experts))) if kind != "model" else None,
        }

    def write(self, folder: Path, ended: str | None) -> Run:
        """The run, with everything that is missing in it."""
        count, lacks = 0, Counter[tuple[str, str, str]]()
        for record in self.records():
            count += 1
            if record.error is not None:
                lacks[record.router, record.regime, record.error] += 1
        missing = [ended] if ended else []
        if unasked := sum(number for (_, _, why), number in lacks.items() if why == NOT_ASKED):
            missing.append(f"{unasked} records have no score: their questions were not asked")
        missing += [
            f"{router}, {regime}: {number} without a score: {why}"
            for (router, regime, why), number in lacks.items()
            if why != NOT_ASKED
        ]
        if count < self._expected:
            missing.append(f"{self._expected - count} records that scores of others decide")
        found = self._run(missing)
        self._tell("writing", 0, 0)
        write_run(folder, found, self.records(), self.setup.examples)
        return found

    def _run(self, missing: Sequence[str]) -> Run:
        setup, suite = self.setup, self.setup.suite
        references = [each for each in infos(sorted(each.name for each in setup.experts)) if self._has(each)]
        return Run(
            suite=suite.name,
            digest=suite.digest,
            base=suite.base_model.name,
            experts=tuple(
                ExpertInfo(
                    name=each.name, digest=each.digest, rank=each.rank, parameters=setup.parameters.get(each.name, 0)
                )
                for each in setup.experts
            ),
            tasks=tuple(setup.tasks),
            routers=(*references, *map(router_info, suite.routers)),
            regimes=suite.regimes,
            baseline=suite.baseline,
            expected=self._expected,
            complete=not missing,
            missing=tuple(missing),
            resident=setup.resident,
            traces=tuple(self._traces()),
            settings=dict(setup.settings),
        )

    def _has(self, row: RouterInfo) -> bool:
        return row.name != "random-weights" or bool(self.setup.random)

    def _traces(self) -> Iterator[dict[str, Any]]:
        dropped = ("id", "decision")
        for router, questions in self._traced.items():
            replies = self.questions.replies(questions.values())
            for example, question in questions.items():
                reply = replies.get(question.key)
                if reply is None or reply.trace is None:
                    continue
                # Without ids and times, and without digits that depend on what else was in the batch.
                trace = {key: rounded(value) for key, value in reply.trace.items() if key not in dropped}
                yield {
                    "router": router,
                    "regime": "in-distribution",
                    "example": example,
                    "prompt": question.example.prompt.routing_text(),
                    "trace": trace,
                }


def rounded(value: Any, digits: int = 4) -> Any:
    """Every number in lists of lists."""
    if isinstance(value, list):
        return [rounded(each, digits) for each in value]
    return round(value, digits) if isinstance(value, float) else value


class Progress:
    """Counts answers, and tells."""

    def __init__(self, tell: Tell, known: int, total: int) -> None:
        self._tell, self.done, self._total = tell, known, total
        self.answered = 0

    def advance(self, reply: Reply) -> None:
        self.done += 1
        self.answered += reply.error is None
        self._tell("asking", self.done, self._total)


def router_info(entry: RouterEntry) -> RouterInfo:
    told = entry.model_dump(mode="json", include={"method", "settings", "model", "blend"}, exclude_defaults=True)
    return RouterInfo(name=entry.name, family=entry.family, about=entry.about, settings=told)
