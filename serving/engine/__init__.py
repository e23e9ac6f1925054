"""What runs the model. The rest of the server knows an engine only through this narrow protocol."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True)
class Adapter:
    """A PEFT directory that the engine can load.

    `name` is unique for its content for ever (`reverse@1f2e3d4c5b6a`), because prefix caches key on it;
    `shown` is what responses call it (`reverse`); `digest` is the sha256 of its content.
    """

    name: str
    path: Path
    shown: str
    digest: str


@dataclass(frozen=True, eq=False)
class Trace:
    """What one traced request left in the engine.

    groups    names of the groups of modules that share an input, in the order of computation ("" where the
              composite adapts nothing); `weights (groups, K)` the mean gate weight of each expert in each
    tokens    how many tokens were computed; `top (tokens,)` the expert with the largest total weight for each
    evidence  (K,) all evidence after the last token; zeros when the gate keeps none
    moments   only for `moerge_collect: "moments"`: sums over tokens of the gate's raw score, `<module>.score (K,)`, of
              its square, `<module>.square (K,)`, and of the rank-space buffer, `<module>.z (R,)`; how many tokens
              that were, `<module>.count (K,)`
    """

    groups: tuple[str, ...]
    tokens: int
    weights: NDArray[np.floating[Any]]
    top: NDArray[np.integer[Any]]
    evidence: NDArray[np.floating[Any]]
    moments: dict[str, NDArray[np.floating[Any]]]


class EngineError(Exception):
    """Anything the engine cannot do."""


class EngineUnavailable(EngineError):
    """The engine is starting, restarting or down: nothing can be answered now."""


class AdapterLoadFailed(EngineError):
    """The engine refused an adapter."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"The engine could not load expert '{name}': {why}")


class Engine(Protocol):
    """An ASGI app with the OpenAI surface, plus adapters loaded and unloaded by name."""

    base_model: str

    @property
    def app(self) -> ASGIApp:
        """The OpenAI surface. Raises EngineUnavailable when there is none now."""
        ...

    async def start(self) -> None:
        """Bring the engine up; returns when it can answer. Raises EngineError with the reason otherwise."""
        ...

    async def stop(self) -> None:
        """Free the model. Safe to call twice, and before `start`."""
        ...

    async def load(self, adapter: Adapter) -> None:
        """Load an adapter, or do nothing if its name is loaded. Raises AdapterLoadFailed."""
        ...

    async def unload(self, name: str) -> None:
        """Forget an adapter; nothing happens when it is not loaded."""
        ...

    async def trace(self, key: str) -> Trace | None:
        """What the request with `vllm_xargs: {"moerge_trace": key}` left, once; None: no such request, or too old."""
        ...

    def loaded(self) -> frozenset[str]:
        """Names of the adapters that requests can name now."""
        ...

    async def health(self) -> str | None:
        """None when the engine can answer, otherwise what is wrong."""
        ...
