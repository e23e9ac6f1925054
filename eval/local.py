"""The slow twin of a server: the same questions answered in this process, by Transformers and PEFT.

    engine = Local(base, {"roman": folder, ...}, samples={"roman": (Sample(prompt="..."), ...)})
    async for ask, reply in engine.answers(asks): ...

It defines what is right, and answers where no vLLM is installed: an expert loaded by PEFT itself, a blend as
`router.blending` builds it and PEFT loads it, a composite weighed by `eval.twin`. `eval.adapting` puts them on the
model. On the CPU, greedily, one recipe after the other.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from adapters_registry.expert import Sample
from adapters_registry.manifest import BaseRef
from eval.adapting import AdaptedModel, Begin, NoTemplate, UnknownExpert, prior
from eval.asking import Ask, Likelihood, Reply
from eval.greedy import greedy, padded
from eval.recipe import Recipe
from eval.served import fingerprint
from router.blending import BlendError
from router.composite import CompositeError
from router.decision import Verdict

BATCH = 32  # rows in one pass of the model
#: What can be wrong with a recipe.
REFUSED = (UnknownExpert, NoTemplate, BlendError, CompositeError)


class Local:
    """An `eval.asking.Engine`. `experts` are PEFT folders by name, `max_rank` is what blends are cut to.

    `samples` are the experts', on which some operators and gates have something measured. Trained gates, sampling and
    traces need a server.
    """

    def __init__(
        self,
        base: BaseRef,
        experts: Mapping[str, Path],
        *,
        samples: Mapping[str, Sequence[Sample]] | None = None,
        max_rank: int = 256,
        batch: int = BATCH,
    ) -> None:
        self._base = base
        self._batch = batch
        self._adapted = AdaptedModel(base, experts, samples or {}, max_rank)
        self._experts = frozenset(experts)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="moerge-eval-peft")  # the model is one
        told = {
            "base": [fingerprint(base), base.dtype],
            "max_rank": max_rank,
            "versions": [version(each) for each in ("moerge", "torch", "transformers", "peft")],
            "samples": {name: [each.model_dump() for each in some] for name, some in (samples or {}).items()},
        }
        self.id = "peft " + hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    async def answers(self, asks: Sequence[Ask]) -> AsyncIterator[tuple[Ask, Reply]]:
        """Recipe by recipe, in batches of like questions."""
        loop = asyncio.get_running_loop()
        for some in batches(asks, self._batch):
            replies = await loop.run_in_executor(self._worker, self._replies, some)
            for pair in zip(some, replies, strict=True):
                yield pair

    def close(self) -> None:
        """Ends with the batch that is under way."""
        self._worker.submit(self._adapted.clear)
        self._worker.shutdown(wait=False)

    # In the worker's thread

    def _replies(self, asks: Sequence[Ask]) -> list[Reply]:
        """Of asks with the same recipe, the same length of an answer, and the same kind."""
        began = time.perf_counter()
        try:
            replies = self._answered(self._settled(asks[0].recipe), asks)
        except REFUSED as error:
            replies = [Reply(error=str(error))] * len(asks)
        took = time.perf_counter() - began
        return [each if each.error else each.model_copy(update={"seconds": took}) for each in replies]

    def _settled(self, recipe: Recipe) -> Recipe:
        """A model's name is the base model's or an expert's here."""
        if recipe.kind != "model":
            return recipe
        if recipe.model == self._base.name:
            return Recipe()
        if recipe.model in self._experts:
            return Recipe.expert(recipe.model)
        raise UnknownExpert(f"Nobody routes in this process, and there is no expert '{recipe.model}': ask a server.")

    def _answered(self, recipe: Recipe, asks: Sequence[Ask]) -> list[Reply]:
        prompts = [self._adapted.tokens(ask.prompt) for ask in asks]
        replies: dict[int, Reply] = {}
        for n, (ask, prompt) in enumerate(zip(asks, prompts, strict=True)):
            if why := self._against(ask, len(prompt)):
                replies[n] = Reply(error=why)
        left = [n for n in range(len(asks)) if n not in replies]
        for chosen, which in self._by_recipe(recipe, prompts, left).items():
            begin = self._adapted.begin(chosen)
            answered = (
                self._likelihoods(begin, [asks[n] for n in which], [prompts[n] for n in which])
                if asks[0].choices
                else self._texts(begin, asks[0], [prompts[n] for n in which])
            )
            told = {} if chosen == recipe else {"experts": chosen.experts, "method": "probe"}
            replies |= {n: reply.model_copy(update=told) for n, reply in zip(which, answered, strict=True)}
        return [replies[n] for n in range(len(asks))]

    def _against(self, ask: Ask, length: int) -> str | None:
        """Why a question cannot be asked here."""
        if ask.temperature or ask.n != 1:
            return (
                f"In this process answers are greedy, one to a question; {ask.n} at a temperature of "
                f"{ask.temperature:g} need a server."
            )
        limit = self._base.context or getattr(self._adapted.model.config, "max_position_embeddings", None)
        if limit is not None and length + (0 if ask.choices else ask.max_tokens) > limit:
            return (
                f"A prompt of {length} tokens and an answer of {ask.max_tokens} are more than the context of {limit}."
            )
        return None

    def _by_recipe(self, recipe: Recipe, prompts: Sequence[Sequence[int]], which: list[int]) -> dict[Recipe, list[int]]:
        """Who answers whom: of a probe the member that the evidence E in the prompt speaks for.

        p = softmax(log prior + beta E), as the server has it.
        """
        if not which or recipe.kind != "gate" or recipe.gate != "probe":
            return {recipe: which} if which else {}
        evidence = self._adapted.evidence(recipe, [prompts[n] for n in which])  # (rows, K)
        log = torch.tensor(prior(recipe), dtype=torch.float64).log() + Verdict().beta * evidence
        found: dict[Recipe, list[int]] = defaultdict(list)
        for n, best in zip(which, log.argmax(1).tolist(), strict=True):
            found[Recipe.expert(recipe.names[best])].append(n)
        return found

    def _texts(self, begin: Begin, like: Ask, prompts: Sequence[list[int]]) -> list[Reply]:
        tokenizer = self._adapted.tokenizer

        def ended(tokens: Sequence[int]) -> bool:
            return bool(like.stop) and any(stop in tokenizer.decode(tokens) for stop in like.stop)

        with begin(len(prompts)) as forward:
            found = greedy(forward, prompts, limit=like.max_tokens, eos=self._ends(), ended=ended)
        return [
            Reply(
                texts=(until(tokenizer.decode(tokens, skip_special_tokens=True), like.stop),),
                prompt_tokens=len(prompt),
                tokens=len(tokens),
            )
            for prompt, tokens in zip(prompts, found, strict=True)
        ]

    def _ends(self) -> set[int]:
        """Tokens that end an answer."""
        given = self._adapted.model.generation_config
        ends = {self._adapted.tokenizer.eos_token_id}
        more = None if given is None else given.eos_token_id
        return (ends | set(more if isinstance(more, list) else [more])) - {None}

    def _likelihoods(self, begin: Begin, asks: Sequence[Ask], prompts: Sequence[list[int]]) -> list[Reply]:
        rows = [row for ask, prompt in zip(asks, prompts, strict=True) for row in self._rows(ask, prompt)]
        found: list[Likelihood] = []
        for first in range(0, len(rows), self._batch):
            some = rows[first : first + self._batch]
            with begin(len(some)) as forward, torch.inference_mode():
                logits, _ = forward(*padded([row for _, row in some]), None)  # (batch, length, vocabulary)
            found += [likelihood(each, row, start) for each, (start, row) in zip(logits, some, strict=True)]
        replies = []
        for ask, prompt in zip(asks, prompts, strict=True):
            mine, found = found[: len(ask.choices)], found[len(ask.choices) :]
            replies.append(Reply(likelihoods=tuple(mine), prompt_tokens=len(prompt)))
        return replies

    def _rows(self, ask: Ask, prompt: list[int]) -> list[tuple[int, list[int]]]:
        """Of each choice: how many tokens stand before it, and all tokens; cut as `eval.endpoint` cuts them."""
        tokenizer = self._adapted.tokenizer
        if ask.prompt.form == "chat":
            ends = [list(tokenizer(choice, add_special_tokens=False)["input_ids"]) for choice in ask.choices]
            return [(len(prompt), prompt + end) for end in ends]
        text = ask.prompt.text.rstrip()
        before = len(tokenizer(text)["input_ids"])
        blanks = ask.prompt.text[len(text) :]
        return [(before, list(tokenizer(text + blanks + choice)["input_ids"])) for choice in ask.choices]


def batches(asks: Sequence[Ask], size: int) -> list[list[Ask]]:
    """Asks that can be answered together, of similar length, those of one recipe behind each other."""
    alike: dict[str, list[Ask]] = defaultdict(list)
    for ask in asks:
        told = [ask.recipe.model_dump_json(), bool(ask.choices), ask.max_tokens, ask.stop, ask.prompt.form]
        alike[json.dumps(told)].append(ask)
    found = []
    for key in sorted(alike):
        some = sorted(alike[key], key=lambda ask: len(ask.prompt.text))
        found += [some[first : first + size] for first in range(0, len(some), size)]
    return found


def until(text: str, stop: Sequence[str]) -> str:
    """The text before the first of these."""
    return text[: min((text.index(each) for each in stop if each in text), default=len(text))]


def likelihood(logits: Tensor, row: Sequence[int], start: int) -> Likelihood:
    """Of the tokens from `start` on, but for a first one, which nothing predicts; logits (length, vocabulary)."""
    start = max(start, 1)
    wanted = torch.tensor(row[start:], dtype=torch.long)
    told = logits[len(logits) - len(row) + start - 1 : -1].float().log_softmax(-1)  # (tokens, vocabulary)
    found = told.gather(1, wanted[:, None])[:, 0]
    greedy = bool((told.argmax(1) == wanted).all()) if len(wanted) else False
    return Likelihood(logprob=float(found.double().sum()), tokens=len(wanted), greedy=greedy)
