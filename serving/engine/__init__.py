"""What runs the model. The rest of the server knows an engine only through this narrow protocol."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

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

    def loaded(self) -> frozenset[str]:
        """Names of the adapters that requests can name now."""
        ...

    async def health(self) -> str | None:
        """None when the engine can answer, otherwise what is wrong."""
        ...
