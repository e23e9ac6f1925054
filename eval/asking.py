"""Questions and answers: what is asked of an engine, and what comes back. Plain data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from eval.recipe import Recipe
from router.text import BUDGET, routing_text

#: Progress: what is being done, how much of it is done, of how much (0: nobody knows).
Tell = Callable[[str, int, int], None]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Prompt(Frozen):
    """`chat`: a system message, if any, and a turn of the user, by the model's template; `completion`: as it is."""

    text: str
    system: str = ""
    form: Literal["chat", "completion"] = "chat"

    def body(self) -> dict[str, Any]:
        """What a request has instead of a question: `messages` or `prompt`."""
        if self.form == "completion":
            return {"prompt": self.text}
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {"messages": [*system, {"role": "user", "content": self.text}]}

    def routing_text(self, budget: int = BUDGET) -> str:
        """What a server's router reads of it, in so many characters."""
        return routing_text(self.body(), budget)


class Ask(Frozen):
    """One question to one recipe.

    choices  continuations whose log-likelihoods are wanted, instead of an answer
    n        answers wanted, drawn with `seed`, when the temperature (>= 0) is not 0
    traced   also how a gate weighed its experts
    """

    recipe: Recipe
    prompt: Prompt
    max_tokens: int = 64
    stop: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    temperature: float = 0.0
    n: int = 1
    seed: int = 0
    traced: bool = False

    def key(self, engine: str, contents: Mapping[str, str]) -> str:
        """sha256 (hex) of everything that an answer depends on: the question, the engine's id, the experts' digests."""
        told = self.model_dump(mode="json")
        told["contents"] = {name: contents.get(name, "") for name in (*self.recipe.names, self.recipe.general or "")}
        told["engine"] = engine
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


class Likelihood(Frozen):
    """Of one continuation: log-likelihood (nats, summed over its tokens), and whether greedy decoding says it."""

    logprob: float
    tokens: int
    greedy: bool = False


class Reply(Frozen):
    """What an engine answered.

    texts    n answers; none where only log-likelihoods were asked for
    seconds  from asking to the last token, beside all that was asked at the same time
    tokens   generated, over all texts
    error    why there is no answer; such a reply is never kept
    The rest is what a server that routes by itself says: (expert, weight), the method, its confidence and time.
    """

    texts: tuple[str, ...] = ()
    likelihoods: tuple[Likelihood, ...] = ()
    prompt_tokens: int = 0
    tokens: int = 0
    seconds: float = 0.0
    error: str | None = None
    experts: tuple[tuple[str, float], ...] | None = None
    method: str | None = None
    confidence: float | None = None
    route_ms: float | None = None
    trace: dict[str, object] | None = None

    @property
    def text(self) -> str:
        return self.texts[0] if self.texts else ""


class Engine(Protocol):
    """What answers. `id` tells engines apart whose answers differ."""

    id: str

    def answers(self, asks: Sequence[Ask]) -> AsyncIterator[tuple[Ask, Reply]]:
        """Every ask with its reply, as they come, in any order. An ask that fails has a reply with `error`.

        Raises EngineGone when nothing can be answered any more.
        """
        ...


class EngineGone(Exception):
    """Whatever answered does not any more; what it had answered is kept."""
