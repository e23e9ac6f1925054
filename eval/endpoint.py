"""Asks an OpenAI endpoint, by OpenAI's client: a Moerge server, or any other where recipes are plain models.

Log-likelihoods need two of vLLM's extensions: `/tokenize`, and `prompt_logprobs` of completions.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from eval.asking import Ask, EngineGone, Likelihood, Reply
from eval.recipe import Recipe
from eval.testbed.remote import parse_experts

if TYPE_CHECKING:
    from openai import AsyncOpenAI

CONCURRENCY = 32
RETRIES = 5  # by the client, with growing pauses: half a minute in all, or what the server asks for
FAILURES = 8  # questions in a row without an answer after which the endpoint is asked whether it is there
LANES = 4  # recipes that are asked side by side: one that has to be built holds up none of the others
TIMEOUT = 600.0  # seconds for one answer
#: Codes of Moerge's errors that are about one recipe, whatever their status.
OF_ONE = ("expert_load_failed", "composite_refused", "blend_refused")


class Endpoint:
    """An `eval.asking.Engine` behind `url` (`http://host:port/v1`).

    base         what the endpoint calls the base model
    concurrency  questions in flight
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        *,
        base: str,
        concurrency: int = CONCURRENCY,
        retries: int | None = None,
        timeout: float = TIMEOUT,
    ) -> None:
        self.id = f"{url} {base}"
        self._base = base
        self._concurrency = concurrency
        self._url, self._api_key, self._timeout = url, api_key, timeout
        self._retries = RETRIES if retries is None else retries
        self._opened: AsyncOpenAI | None = None
        self._tokens: dict[tuple[Any, ...], asyncio.Task[list[int]]] = {}
        self._refused = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._opened is not None:
            await self._opened.close()

    @property
    def _client(self) -> AsyncOpenAI:
        if self._opened is None:
            from openai import AsyncOpenAI, Timeout  # takes a second to import

            self._opened = AsyncOpenAI(
                base_url=self._url,
                api_key=self._api_key or "none",
                max_retries=self._retries,
                timeout=Timeout(self._timeout, connect=10),
            )
        return self._opened

    async def answers(self, asks: Sequence[Ask]) -> AsyncIterator[tuple[Ask, Reply]]:
        """As they come. Raises EngineGone when nobody is there any more."""
        waiting = iter(in_lanes(asks))
        done: asyncio.Queue[tuple[Ask, Reply] | Exception] = asyncio.Queue(2 * self._concurrency)

        async def work() -> None:
            try:
                for ask in waiting:
                    await done.put((ask, await self._asked(ask)))
            except Exception as error:
                await done.put(error)

        workers = [asyncio.create_task(work()) for _ in range(min(self._concurrency, len(asks)))]
        try:
            for _ in range(len(asks)):
                each = await done.get()
                if isinstance(each, Exception):
                    raise each
                yield each
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def models(self) -> list[str]:
        """What may be asked for. Raises EngineGone."""
        from openai import OpenAIError

        try:
            return [each.id async for each in await self._client.models.list()]
        except OpenAIError as error:
            raise EngineGone(f"{self._url}: {told(error)}") from error

    async def digests(self) -> dict[str, str]:
        """Of the experts' contents, by name, where the endpoint is a Moerge server."""
        from openai import OpenAIError

        try:
            found = cast(dict[str, Any], await self._client.get("/experts", cast_to=object))
            return {row["name"]: row["digest"] for row in found["data"]}
        except (OpenAIError, TypeError, KeyError):
            return {}

    async def _asked(self, ask: Ask) -> Reply:
        from openai import APIConnectionError, APIStatusError, OpenAIError

        began = time.perf_counter()
        try:
            reply = await (self._likelihoods(ask) if ask.choices else self._texts(ask))
        except APIConnectionError as error:
            return await self._failed(error)
        except APIStatusError as error:
            if error.status_code >= 500 and error.code not in OF_ONE:
                return await self._failed(error)
            self._refused = 0
            return Reply(error=told(error))
        except (OpenAIError, CannotTell) as error:
            return Reply(error=told(error))
        self._refused = 0
        return reply.model_copy(update={"seconds": time.perf_counter() - began})

    async def _failed(self, error: Exception) -> Reply:
        """Raises EngineGone when that was one too many and the endpoint is not there."""
        from openai import OpenAIError

        self._refused += 1
        if self._refused >= FAILURES:
            self._refused = 0
            try:
                await self._client.with_options(max_retries=0, timeout=30).models.list()
            except OpenAIError as gone:
                raise EngineGone(f"{self._url} does not answer any more: {told(gone)}") from error
        return Reply(error=told(error))

    async def _texts(self, ask: Ask) -> Reply:
        body, extra = self._body(ask)
        common: dict[str, Any] = {
            "model": body["model"],
            "max_tokens": ask.max_tokens,
            "temperature": ask.temperature,
            "n": ask.n,
            "extra_body": extra,
        }
        if ask.stop:
            common["stop"] = list(ask.stop)
        if ask.temperature:
            common["seed"] = ask.seed
        if ask.prompt.form == "chat":
            raw = await self._client.chat.completions.with_raw_response.create(
                messages=cast(Any, ask.prompt.body()["messages"]), **common
            )
            headers, chat = raw.headers, raw.parse()
            texts, usage = tuple(each.message.content or "" for each in chat.choices), chat.usage
        else:
            written = await self._client.completions.with_raw_response.create(prompt=ask.prompt.text, **common)
            headers, parsed = written.headers, written.parse()
            texts, usage = tuple(each.text for each in parsed.choices), parsed.usage
        return Reply(
            texts=texts,
            prompt_tokens=usage.prompt_tokens if usage else 0,
            tokens=usage.completion_tokens if usage else 0,
            trace=await self._trace(headers) if ask.traced else None,
            **decided(headers),
        )

    def _body(self, ask: Ask, recipe: Recipe | None = None) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """`model`, and what OpenAI's API does not have."""
        body = (recipe or ask.recipe).request(self._base)
        moerge = body.get("moerge", {}) | ({"trace": True} if ask.traced else {})
        return body, {"moerge": moerge} if moerge else None

    async def _trace(self, headers: Mapping[str, str]) -> dict[str, object] | None:
        where = headers.get("x-moerge-trace")
        if where is None:
            return None
        return cast(dict[str, object], await self._client.get(where.removeprefix("/v1"), cast_to=object))

    # Log-likelihoods

    async def _likelihoods(self, ask: Ask) -> Reply:
        """Of each choice after the prompt: those of the choice's tokens, from one pass over both."""
        recipe, answered = ask.recipe, dict[str, Any]()
        if recipe.kind == "model":
            recipe, answered = await self._settled(ask)
        before, rows = await self._rows(ask)
        body, extra = self._body(ask, recipe)
        raw = await self._client.completions.with_raw_response.create(
            model=body["model"],
            prompt=rows,
            max_tokens=1,
            temperature=0,
            extra_body={**(extra or {}), "prompt_logprobs": 0},
        )
        parsed = raw.parse()
        ordered = sorted(parsed.choices, key=lambda choice: choice.index)
        if len(ordered) != len(rows) or any(getattr(each, "prompt_logprobs", None) is None for each in ordered):
            raise CannotTell("This endpoint gives no log-likelihoods: completions have no 'prompt_logprobs' (vLLM's).")
        return Reply(
            likelihoods=tuple(
                likelihood(each.prompt_logprobs, row, start)
                for each, row, start in zip(cast(list[Any], ordered), rows, before, strict=True)
            ),
            prompt_tokens=parsed.usage.prompt_tokens if parsed.usage else 0,
            **{**decided(raw.headers), **answered},
        )

    async def _settled(self, ask: Ask) -> tuple[Recipe, dict[str, Any]]:
        """Whom a server that routes by itself takes for this prompt, so that all choices have the same expert.

        Tokens say nothing to a router, so the prompt itself is asked. Raises CannotTell.
        """
        asked = ask.model_copy(update={"choices": (), "max_tokens": 1, "traced": False})
        reply = await self._texts(asked)
        if reply.experts is None:
            return ask.recipe, {}
        answered = {key: getattr(reply, key) for key in ("experts", "method", "confidence", "route_ms")}
        if not reply.experts:
            return Recipe(), answered
        if len(reply.experts) == 1 and reply.experts[0][1] == 1:
            return Recipe.expert(reply.experts[0][0]), answered
        raise CannotTell(
            f"'{ask.recipe.model}' answers by several experts, and log-likelihoods need them named: evaluate the "
            "method itself instead of the endpoint's model."
        )

    async def _rows(self, ask: Ask) -> tuple[list[int], list[list[int]]]:
        """Of each choice: how many tokens stand before it, and all tokens.

        After a chat's template a choice is tokenized by itself; in plain text together with what it continues, where
        blanks at the end of the prompt belong to the choice, as in lm-evaluation-harness.
        """
        if ask.prompt.form == "chat":
            prompt = await self._tokenized(messages=ask.prompt.body()["messages"], add_generation_prompt=True)
            ends = [await self._tokenized(prompt=choice, add_special_tokens=False) for choice in ask.choices]
            return [len(prompt)] * len(ends), [prompt + end for end in ends]
        text = ask.prompt.text.rstrip()
        blanks = ask.prompt.text[len(text) :]
        prompt = await self._tokenized(prompt=text)
        rows = [await self._tokenized(prompt=text + blanks + choice) for choice in ask.choices]
        return [len(prompt)] * len(rows), rows

    async def _tokenized(self, **body: Any) -> list[int]:
        """vLLM's `/tokenize`; the same text is sent once. Raises CannotTell."""
        key = (str(body),)
        if key not in self._tokens:
            if len(self._tokens) > 50_000:
                self._tokens.clear()
            self._tokens[key] = asyncio.create_task(self._tokenize(body))
        try:
            return await asyncio.shield(self._tokens[key])
        except Exception:
            self._tokens.pop(key, None)
            raise

    async def _tokenize(self, body: dict[str, Any]) -> list[int]:
        from openai import APIStatusError

        address = self._client.base_url.join("/tokenize")
        try:
            found = await self._client.post(str(address), body={"model": self._base, **body}, cast_to=object)
        except APIStatusError as error:
            if error.status_code in (404, 405, 501):
                raise CannotTell("This endpoint gives no log-likelihoods: it has no /tokenize (vLLM's).") from error
            raise
        return cast(dict[str, list[int]], found)["tokens"]


class CannotTell(Exception):
    """What the endpoint cannot be asked for."""


def in_lanes(asks: Sequence[Ask]) -> list[Ask]:
    """By recipe, some recipes side by side."""
    order = sorted(asks, key=lambda ask: (ask.recipe.kind, ask.recipe.model_dump_json()))
    size = -(-len(order) // LANES)
    lanes = [order[start : start + size] for start in range(0, len(order), size or 1)]
    return [lane[k] for k in range(size) for lane in lanes if k < len(lane)]


def decided(headers: Mapping[str, str]) -> dict[str, Any]:
    """What a Moerge server says about who answered."""
    told = headers.get("x-moerge-experts")
    if told is None:
        return {}
    confidence, route_ms = headers.get("x-moerge-confidence"), headers.get("x-moerge-route-ms")
    return {
        "experts": parse_experts(told),
        "method": headers.get("x-moerge-method"),
        "confidence": float(confidence) if confidence else None,
        "route_ms": float(route_ms) if route_ms else None,
    }


def likelihood(steps: Sequence[Mapping[str, Any] | None], row: Sequence[int], start: int) -> Likelihood:
    """Of the tokens from `start` on; `steps` has for each token {id: {logprob, rank}}, None where nothing is before."""
    found = [step[str(token)] for step, token in zip(steps[start:], row[start:], strict=True) if step is not None]
    return Likelihood(
        logprob=sum(each["logprob"] for each in found),
        tokens=len(found),
        greedy=bool(found) and all(each["rank"] == 1 for each in found),
    )


def told(error: Exception) -> str:
    """The server's own words, where it had some."""
    body = getattr(error, "body", None)
    if isinstance(body, dict) and isinstance(message := body.get("message"), str):
        return message
    cause = error.__cause__
    return f"{error} ({cause})" if cause is not None and str(cause) else str(error)
