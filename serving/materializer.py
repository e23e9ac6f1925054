"""From a decision to something that the engine can load.

    select   the expert's own folder
    gate     a composite of its experts, built once: built/<digest>/, named by all that decides what it computes
    blend    a blend of its experts, likewise

What is built is written beside its place and moved there when it is complete, so what a killed process leaves is never
used. The folders are bounded by bytes: the least recently used one goes, never one that is in use or loaded.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cachetools import LRUCache, TTLCache

from adapters_registry.expert import Expert
from adapters_registry.store import Store, refuse_when_full
from router.decision import Decision
from serving import metrics
from serving.engine import Adapter, AdapterLoadFailed
from serving.recipes import Kind, Pantry, Plan, Recipe, Refused, Stored, Tensors, expert_adapter, kept, recipe_of

logger = logging.getLogger("moerge")

#: For how long what could not be built or loaded is not tried again (seconds).
PATIENCE = 30.0
#: Recipes whose result is remembered; the others are planned again.
KNOWN = 4096


@dataclass(eq=False)
class Entry:
    """A folder on disk: its experts' ids, its size, who uses it now, and the lock that keeps it meanwhile."""

    kind: Kind | None
    adapter: Adapter
    members: frozenset[str]
    size: int
    users: int = 0
    lock: int | None = None
    doomed: bool = False

    @property
    def usable(self) -> bool:
        return self.lock is not None and not self.doomed

    def replace(self, other: Entry) -> None:
        """Be what the other is; those that use this one let go of it."""
        self.release()
        self.kind, self.adapter, self.members, self.size = other.kind, other.adapter, other.members, other.size
        self.lock, self.doomed = other.lock, other.doomed

    def release(self) -> None:
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None


class Materializer:
    """`find` gives an expert of a decision by id; `tensors(expert, key)` what is stored with it."""

    def __init__(
        self, folder: Path, *, find: Callable[[str], Expert], tensors: Tensors, max_rank: int, max_bytes: int
    ) -> None:
        self._find = find
        self._pantry = Pantry(find, tensors, max_rank)
        self._max_bytes = max_bytes
        self._store = Store(folder)
        self._store.collect(lambda digest: True)  # what was never finished
        self._entries = OrderedDict((each.adapter.digest, each) for each in found(self._store))  # least recent first
        self._known: LRUCache[Recipe, str] = LRUCache(KNOWN)  # digest of what has been asked for
        self._failed: TTLCache[Recipe, Exception] = TTLCache(maxsize=1024, ttl=PATIENCE)
        self._making: dict[Recipe, asyncio.Task[None]] = {}
        self._reading: dict[Recipe, frozenset[str]] = {}
        # Whoever is refused, or finds what is there, does not wait for those that build.
        self._planners = ThreadPoolExecutor(2, thread_name_prefix="moerge-plan")
        # One at a time, as it uses all cores by itself; what takes a second does not wait for what takes minutes.
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="moerge-build")
        self._slow_builder = ThreadPoolExecutor(1, thread_name_prefix="moerge-build-slow")

    @asynccontextmanager
    async def hold(self, decision: Decision, given: Stored | None = None) -> AsyncIterator[Adapter]:
        """The adapter of a `select`, `gate` or `blend` decision, which stays on disk for the block.

        `given`, by expert's id, comes in place of what is stored with a composite's experts.
        Raises CompositeError or BlendError with every reason, StoreFull, and ExpertNotFound for an expert that was
        just taken away.
        """
        if decision.kind == "select":
            yield expert_adapter(self._find(decision.experts[0].id))
            return
        recipe = recipe_of(decision, given)
        for expert in recipe.reads:
            self._find(expert)
        entry = await self._entry(recipe)
        entry.users += 1
        try:
            yield entry.adapter
        except AdapterLoadFailed as error:  # whatever is wrong with it, it is made anew, but not at once
            self._failed[recipe], entry.doomed = error, True
            raise
        finally:
            entry.users -= 1

    async def plan(self, decision: Decision) -> Plan:
        """What a `gate` or `blend` decision's adapter would be; nothing is built.

        Raises CompositeError or BlendError with every reason against it, ExpertNotFound.
        """
        return await asyncio.get_running_loop().run_in_executor(self._planners, recipe_of(decision).plan, self._pantry)

    async def _entry(self, recipe: Recipe) -> Entry:
        while True:
            if (error := self._failed.get(recipe)) is not None:
                raise error.with_traceback(None)
            entry = self._entries.get(self._known.get(recipe, ""))
            if entry is not None and entry.usable:
                self._entries.move_to_end(entry.adapter.digest)
                return entry
            if (task := self._making.get(recipe)) is None:
                task = self._making[recipe] = asyncio.create_task(self._make(recipe))
                task.add_done_callback(lambda task: self._made(recipe, task))
            await asyncio.shield(task)  # who asked may leave; whoever comes next wants it as well

    def _made(self, recipe: Recipe, task: asyncio.Task[None]) -> None:
        del self._making[recipe]
        self._reading.pop(recipe, None)
        if not task.cancelled() and isinstance(error := task.exception(), Refused):
            self._failed[recipe] = error

    async def _make(self, recipe: Recipe) -> None:
        """Find it on disk, or put it there; it is held for us when this returns."""
        self._reading[recipe] = frozenset(self._find(each).digest for each in recipe.reads)
        loop = asyncio.get_running_loop()
        plan = await loop.run_in_executor(self._planners, recipe.plan, self._pantry)
        entry = self._entries.get(plan.digest)
        if entry is None or not entry.usable:
            made = await loop.run_in_executor(self._planners, self._look, recipe, plan.digest)
            if made is None:
                builder = self._slow_builder if recipe.slow else self._builder
                made = await loop.run_in_executor(builder, self._build, recipe, plan)
            else:
                recipe.count("found")
            if (entry := self._entries.setdefault(plan.digest, made)) is not made:
                entry.replace(made)
        self._entries.move_to_end(plan.digest)
        self._known[recipe] = plan.digest

    def _look(self, recipe: Recipe, digest: str) -> Entry | None:
        """Blocks. What is on disk, unless it is damaged: then it is deleted."""
        if (lock := self._store.hold(digest)) is None:
            return None
        path = self._store.path(digest)
        try:
            recipe.check(path)
        except Refused as error:
            logger.warning("A %s on disk is damaged and is built again: %s", recipe.kind, error)
            os.close(lock)
            self._store.discard(digest, lambda digest: False)
            return None
        with suppress(OSError):
            os.utime(path)  # used now
        return Entry(recipe.kind, recipe.adapter(digest, path), frozenset(recipe.members), size(path), lock=lock)

    def _build(self, recipe: Recipe, plan: Plan) -> Entry:
        """Blocks. Others may have asked for the same in other words, and have it by now."""
        if (entry := self._look(recipe, plan.digest)) is not None:
            recipe.count("found")
            return entry
        started = time.perf_counter()
        with self._store.stage(plan.digest) as staged:
            with refuse_when_full(self._store.root):
                notes = plan.build(staged.path)
            staged.publish()
            lock = self._store.hold(plan.digest)
        path = self._store.path(plan.digest)
        entry = Entry(recipe.kind, recipe.adapter(plan.digest, path), frozenset(recipe.members), size(path), lock=lock)
        took = time.perf_counter() - started
        logger.info("%s: built of %s in %.3f s.", entry.adapter.name, ", ".join(recipe.members), took)
        for note in notes:
            logger.info("%s: %s", entry.adapter.name, note)
        metrics.BUILD_SECONDS.labels(recipe.kind).observe(took)
        recipe.count("built")
        return entry

    # Keeping in step

    def renew(self) -> None:
        """Look again at what is stored with the experts."""
        self._known.clear()
        self._failed.clear()

    def forget(self, gone: Callable[[str], bool]) -> list[str]:
        """What has a member that is gone will be deleted; the names that the engine may have for it."""
        for entry in self._entries.values():
            entry.doomed = entry.doomed or any(gone(member) for member in entry.members)
        return [each.adapter.name for each in self._entries.values() if each.doomed]

    def digests(self) -> frozenset[str]:
        """Contents of the experts that are being read now: their files must stay."""
        return frozenset().union(*self._reading.values())

    def excess(self) -> list[str]:
        """Names of the least recently used that are too much for the disk, but for those in use: to be unloaded."""
        total = sum(each.size for each in self._entries.values())
        names = []
        for entry in self._entries.values():
            if total > self._max_bytes and not entry.users:
                names.append(entry.adapter.name)
                total -= entry.size
        return names

    async def tidy(self, loaded: Collection[str]) -> None:
        """Let go of what is neither in use nor loaded, and delete the least recently used of it above the limit."""
        gone: list[str] = []
        total = sum(each.size for each in self._entries.values())
        for digest, entry in list(self._entries.items()):
            if entry.users or entry.adapter.name in loaded:
                continue
            entry.release()
            if entry.doomed or total > self._max_bytes:
                total -= entry.size
                del self._entries[digest]
                gone.append(digest)
        for kind, gauge in (("composite", metrics.COMPOSITE_BYTES), ("blend", metrics.BLEND_BYTES)):
            gauge.set(sum(each.size for each in self._entries.values() if each.kind == kind))
        for digest in gone:  # unless somebody holds it again by now, here or in another process
            await asyncio.to_thread(self._store.discard, digest, lambda digest: False)

    async def close(self) -> None:
        """Wait for what is being built, and let go of everything."""
        await asyncio.gather(*self._making.values(), return_exceptions=True)
        for executor in (self._planners, self._builder, self._slow_builder):
            executor.shutdown(wait=False)
        for entry in self._entries.values():
            entry.release()


def found(store: Store) -> list[Entry]:
    """What earlier processes built, least recently used first; what cannot be read is deleted when it is tidied."""
    entries = []
    for path in sorted(map(store.path, store.digests()), key=lambda path: path.stat().st_mtime):
        each = kept(path)
        if each is None:
            nameless = Adapter(f"unknown@{path.name[:12]}", path, "unknown", path.name)
            entries.append(Entry(None, nameless, frozenset(), size(path), doomed=True))
        else:
            entries.append(Entry(each.kind, each.adapter, each.members, size(path)))
    return entries


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
