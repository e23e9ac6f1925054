"""Questions to the engine: samples with known answers, and neutral prompts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from adapters_registry.expert import Expert, Sample
from router.triggers import Step
from serving.engine import AdapterLoadFailed, EngineUnavailable
from serving.internal import post
from serving.recipes import expert_adapter

if TYPE_CHECKING:
    from serving.service import Service

#: Questions in flight at once, and the longest answer to a sample (tokens).
WIDTH, MOST_TOKENS = 16, 256

#: Told of the share that is done, in [0, 1].
Tell = Callable[[float], None]


class Question(NamedTuple):
    """A prompt to be continued greedily by so many tokens; of each step so many of the likeliest are told."""

    prompt: str
    tokens: int
    likeliest: int = 0

    @classmethod
    def of(cls, sample: Sample) -> Question:
        """No answer has more tokens than bytes; a few more show who would go on."""
        return cls(sample.prompt, min(len((sample.answer or "").encode()) + 8, MOST_TOKENS))


class Answer(NamedTuple):
    text: str
    steps: tuple[Step, ...]


class Asker:
    """Asks whatever one check asks; equal questions are asked once. Of experts, None is the base model."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._width = asyncio.Semaphore(WIDTH)
        self._batch = asyncio.Semaphore(service.settings.engine.slots)
        self._answers: dict[tuple[str | None, Question], Answer | None] = {}

    def score(self, who: Expert | None, sample: Sample) -> float | None:
        """1 for the sample's very answer, give or take white space around it, else 0; None: that was not answered."""
        answer = self._answers.get((_id(who), Question.of(sample)))
        if answer is None or sample.answer is None:
            return None
        return float(answer.text.strip() == sample.answer.strip())

    def steps(self, who: Expert | None, questions: Sequence[Question]) -> list[tuple[Step, ...]] | None:
        """Of each question that was asked; () for one that does not suit the model, None for an expert that does not
        load.
        """
        keys = [(_id(who), question) for question in questions]
        if any(key not in self._answers for key in keys):
            return None
        return [answer.steps if (answer := self._answers[key]) else () for key in keys]

    async def ask(self, questions: Iterable[tuple[Expert | None, Question]], tell: Tell) -> None:
        """Expert by expert, as many at a time as fit one batch of the engine. Raises EngineUnavailable."""
        experts: dict[str | None, Expert | None] = {}
        wanted: dict[str | None, set[Question]] = {}
        for who, question in questions:
            key = _id(who)
            if (key, question) not in self._answers:
                experts[key] = who
                wanted.setdefault(key, set()).add(question)
        total, done = sum(map(len, wanted.values())), 0

        async def one(key: str | None, model: str, question: Question) -> None:
            nonlocal done
            async with self._width:
                self._answers[key, question] = await answered(self._service, model, question)
            done += 1
            tell(done / total)

        async def every(key: str | None) -> None:
            async with self._batch, self._loaded(experts[key]) as model:
                if model is not None:
                    await together(one(key, model, question) for question in sorted(wanted[key]))

        await together(map(every, wanted))

    @asynccontextmanager
    async def _loaded(self, who: Expert | None) -> AsyncIterator[str | None]:
        """The engine's name for it, None when the engine does not take it."""
        async with AsyncExitStack() as stack:
            model: str | None = self._service.engine.base_model
            if who is not None:
                try:
                    await stack.enter_async_context(self._service.residency.lease(expert_adapter(who)))
                    model = who.id
                except AdapterLoadFailed:
                    model = None
            yield model


def _id(who: Expert | None) -> str | None:
    return None if who is None else who.id


async def together(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """All at once; when one fails the others are stopped before that is told."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def answered(service: Service, model: str, question: Question) -> Answer | None:
    """As a chat where the model has a template for that; None when the prompt does not suit the model.

    Raises EngineUnavailable.
    """
    prompt, tokens, likeliest = question
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]}
    plain: dict[str, Any] = {"prompt": prompt}
    if likeliest:
        chat |= {"logprobs": True, "top_logprobs": likeliest}
        plain |= {"logprobs": likeliest}
    for path, body in (("/v1/chat/completions", chat), ("/v1/completions", plain)):
        if service.calibration.stopping:
            raise EngineUnavailable("The server is stopping.")
        response = await post(service.engine, path, {**body, "model": model, "max_tokens": tokens, "temperature": 0})
        if response.status_code >= 500:
            raise EngineUnavailable(f"The engine could not answer a check's question: {response.text:.300}")
        if response.is_success:
            return read_answer(response.json()["choices"][0])
    return None


def read_answer(choice: dict[str, Any]) -> Answer:
    """A choice of either endpoint."""
    logprobs = choice.get("logprobs") or {}
    if "message" not in choice:
        steps = zip(logprobs.get("tokens", ()), logprobs.get("top_logprobs", ()), strict=True)
        return Answer(choice["text"], tuple(steps))
    content = logprobs.get("content") or ()
    told = ((step["token"], {each["token"]: each["logprob"] for each in step["top_logprobs"]}) for step in content)
    return Answer(choice["message"].get("content") or "", tuple(told))
