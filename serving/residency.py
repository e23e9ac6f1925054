"""Which adapters are in the engine: loaded when needed, held while in use, the least recently used one let go."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from serving.engine import Adapter, Engine


class Residency:
    """At most `limit` adapters loaded, more only while more than that are answering at once.

    An adapter is never unloaded under a request: `lease` holds it until the answer has been sent.
    """

    def __init__(self, engine: Engine, limit: int) -> None:
        self._engine = engine
        self._limit = limit
        self._leases: OrderedDict[str, int] = OrderedDict()  # name -> requests in flight, least recent first
        self._leaving: set[str] = set()
        self._digests: dict[str, str] = {}
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.loads = 0

    @asynccontextmanager
    async def lease(self, adapter: Adapter) -> AsyncIterator[None]:
        """Have `adapter` loaded for the body of the block. Raises AdapterLoadFailed or EngineUnavailable."""
        name = adapter.name
        self._digests[name] = adapter.digest
        self._leases[name] = self._leases.pop(name, 0) + 1
        try:
            await self._make_room()
            async with self._turn(name):
                new = name not in self._engine.loaded()
                await self._engine.load(adapter)
                self.loads += new
            yield
        finally:
            self._leases[name] -= 1
            if self._leases[name] == 0 and (name in self._leaving or name not in self._engine.loaded()):
                await self._unload(name)
            await self._make_room()

    async def release(self, name: str) -> None:
        """Unload an adapter that is no longer registered, as soon as nobody uses it."""
        if self._leases.get(name):
            self._leaving.add(name)
        else:
            await self._unload(name)

    def names(self) -> frozenset[str]:
        """Adapters that are loaded, on their way, or answering now."""
        return frozenset(self._leases)

    def digests(self) -> frozenset[str]:
        """Contents of the adapters that are loaded or answering now: their files must stay."""
        return frozenset(self._digests.values())

    def _turn(self, name: str) -> asyncio.Lock:
        """An adapter is loaded or unloaded, never both at a time."""
        return self._turns.setdefault(name, asyncio.Lock())

    async def _make_room(self) -> None:
        while len(self._leases) > self._limit:
            name = next((name for name, count in self._leases.items() if count == 0), None)
            if name is None:
                return
            await self._unload(name)

    async def _unload(self, name: str) -> None:
        async with self._turn(name):
            if self._leases.get(name):
                return  # somebody came while we waited
            await self._engine.unload(name)
            if not self._leases.get(name):  # else somebody waits for us, to load it again
                self._leases.pop(name, None)
                self._digests.pop(name, None)
                self._leaving.discard(name)
