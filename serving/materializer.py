"""From a decision to something that the engine can load.

    select   the expert's own folder
    gate     a composite of its experts, built once: composites/<digest>/, named by all that decides what it computes

A composite is written beside its place and moved there when it is complete, so what a killed process leaves is never
used. The folders are bounded by bytes: the least recently used one goes, never one that is in use or loaded.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from cachetools import TTLCache

from adapters_registry.expert import Expert
from adapters_registry.lora import CONFIG
from adapters_registry.store import Store, refuse_when_full
from router.composite import CompositeError, Part, check_composite, compose, composite_digest, plan, statistics_key
from router.composite.statistics import tables_of
from router.decision import Decision
from router.gating import GATES, gate_of
from router.gating.layout import KEY, Layout, Member
from serving import metrics
from serving.engine import Adapter, AdapterLoadFailed

logger = logging.getLogger("moerge")

#: For how long a composite that could not be built or loaded is not tried again (seconds).
PATIENCE = 30.0

Tensors = Callable[[Expert, str], Mapping[str, Any] | None]
Stored = Mapping[str, Mapping[str, Mapping[str, Any]]]  # expert's id -> key -> tensors


@dataclass(frozen=True)
class Recipe:
    """All that decides what a composite computes, but for what is stored with its experts.

    `settings` are JSON; `given` is empty, or unlike that of every other recipe.
    """

    members: tuple[str, ...]
    gate: str
    settings: str
    general: str | None
    compress: int | None
    given: str


@dataclass(eq=False)
class Entry:
    """A composite on disk: its members' ids, its size, who uses it now, and the lock that keeps it meanwhile."""

    adapter: Adapter
    members: frozenset[str]
    size: int
    users: int = 0
    lock: int | None = None
    doomed: bool = False

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
        self._tensors = tensors
        self._max_rank = max_rank
        self._max_bytes = max_bytes
        self._store = Store(folder)
        self._store.collect(lambda digest: True)  # what was never finished
        self._entries = OrderedDict((each.adapter.digest, each) for each in found(self._store))  # least recent first
        self._known: dict[Recipe, str] = {}  # digest of what has been asked for
        self._failed: TTLCache[Recipe, Exception] = TTLCache(maxsize=1024, ttl=PATIENCE)
        self._building: dict[Recipe, asyncio.Task[Entry]] = {}
        self._reading: dict[Recipe, frozenset[str]] = {}
        self._builder = ThreadPoolExecutor(1, thread_name_prefix="moerge-composite")  # it uses all cores by itself

    @asynccontextmanager
    async def hold(self, decision: Decision, given: Stored | None = None) -> AsyncIterator[Adapter]:
        """The adapter of a `select` or `gate` decision, which stays on disk for the block.

        `given`, by expert's id, comes in place of what is stored with the experts.
        Raises CompositeError with every reason, ExpertNotFound for an expert that was just taken away.
        """
        if decision.kind == "select":
            yield adapter_of(self._find(decision.experts[0].id))
            return
        assert decision.kind == "gate"
        assert decision.gate is not None
        recipe = Recipe(
            members=tuple(each.id for each in decision.experts),
            gate=decision.gate,
            settings=json.dumps(decision.gate_settings, sort_keys=True),
            general=decision.general,
            compress=decision.compress,
            given="" if given is None else uuid.uuid4().hex,
        )
        for member in {*recipe.members, *filter(None, [recipe.general])}:
            self._find(member)
        entry = await self._entry(recipe, given)
        entry.users += 1
        try:
            yield entry.adapter
        except AdapterLoadFailed as error:  # whatever is wrong with it, it is made anew, but not at once
            self._failed[recipe], entry.doomed = error, True
            raise
        finally:
            entry.users -= 1

    async def _entry(self, recipe: Recipe, given: Stored | None) -> Entry:
        while True:
            if (error := self._failed.get(recipe)) is not None:
                raise error.with_traceback(None)
            entry = self._entries.get(self._known.get(recipe, ""))
            if entry is not None and entry.lock is not None and not entry.doomed:
                self._entries.move_to_end(entry.adapter.digest)
                return entry
            if (task := self._building.get(recipe)) is None:
                task = self._building[recipe] = asyncio.create_task(self._build(recipe, given))
                task.add_done_callback(lambda task: self._built(recipe, task))
            await asyncio.shield(task)  # who asked may leave; whoever comes next wants it as well

    def _built(self, recipe: Recipe, task: asyncio.Task[Entry]) -> None:
        del self._building[recipe]
        self._reading.pop(recipe, None)
        if not task.cancelled() and isinstance(error := task.exception(), CompositeError):
            self._failed[recipe] = error

    async def _build(self, recipe: Recipe, given: Stored | None) -> Entry:
        """Find it on disk, or put it there; it is held for us when this returns."""
        members = [self._find(each) for each in recipe.members]
        general = None if recipe.general is None else self._find(recipe.general)
        self._reading[recipe] = frozenset(each.digest for each in [*members, general] if each is not None)
        work = partial(self._make, recipe, members, general, given)
        entry, new = await asyncio.get_running_loop().run_in_executor(self._builder, work)
        digest = entry.adapter.digest
        if (known := self._entries.get(digest)) is not None:  # other settings that mean the same
            known.release()
            known.adapter, known.members, known.size = entry.adapter, entry.members, entry.size
            known.lock, known.doomed = entry.lock, False
            entry = known
        self._entries[digest] = entry
        self._entries.move_to_end(digest)
        self._known[recipe] = digest
        metrics.COMPOSITES.labels(recipe.gate, "built" if new else "found").inc()
        return entry

    def _make(
        self, recipe: Recipe, members: Sequence[Expert], general: Expert | None, given: Stored | None
    ) -> tuple[Entry, bool]:
        """Blocks. The entry, and whether it had to be built."""
        gate, settings = recipe.gate, json.loads(recipe.settings)
        subtracted = None if general is None else self._part(general, (), None)
        keys = needed_tensors(gate, settings, len(members), subtracted, recipe.compress)
        parts = [self._part(each, keys, given) for each in members]
        prepared: dict[str, Any] = {"general": subtracted, "compress": recipe.compress}
        plan(parts, gate, settings, max_rank=self._max_rank, **prepared)  # every reason against it, first of all
        digest = composite_digest(parts, gate, settings, **prepared)
        lock = self._sound(digest)
        if new := lock is None:
            with self._store.stage(digest) as staged:
                with refuse_when_full(self._store.root):
                    layout = compose(staged.path, parts, gate, settings, max_rank=self._max_rank, **prepared)
                for note in layout.notes:
                    logger.info("auto:%s@%s: %s", gate, digest[:12], note)
                staged.publish()
                lock = self._store.hold(digest)
        path = self._store.path(digest)
        with suppress(OSError):
            os.utime(path)  # used now
        return Entry(adapter_for(gate, digest, path), frozenset(recipe.members), size(path), lock=lock), new

    def _sound(self, digest: str) -> int | None:
        """A lock on the composite that is on disk, None when there is none, or a damaged one, which is deleted."""
        if (lock := self._store.hold(digest)) is None:
            return None
        try:
            check_composite(self._store.path(digest))
            return lock
        except CompositeError as error:
            logger.warning("A composite on disk is damaged and is built again: %s", error)
            os.close(lock)
            self._store.discard(digest, lambda digest: False)
            return None

    def _part(self, expert: Expert, keys: Sequence[str], given: Stored | None) -> Part:
        if given is not None:
            kept = given[expert.id]
        else:
            kept = {key: tensors for key in keys if (tensors := self._tensors(expert, key)) is not None}
        return part_of(expert, kept)

    # Keeping in step

    def renew(self) -> None:
        """Look again at what is stored with the experts."""
        self._known.clear()
        self._failed.clear()

    def forget(self, gone: Callable[[str], bool]) -> list[str]:
        """Composites with a member that is gone will be deleted; the names that the engine may have for them."""
        for entry in self._entries.values():
            entry.doomed = entry.doomed or any(gone(member) for member in entry.members)
        return [each.adapter.name for each in self._entries.values() if each.doomed]

    def digests(self) -> frozenset[str]:
        """Contents of the experts that are being read now: their files must stay."""
        return frozenset().union(*self._reading.values())

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
        metrics.COMPOSITE_BYTES.set(total)
        for digest in gone:  # unless somebody holds it again by now, here or in another process
            await asyncio.to_thread(self._store.discard, digest, lambda digest: False)

    async def close(self) -> None:
        """Wait for what is being built, and let go of everything."""
        await asyncio.gather(*self._building.values(), return_exceptions=True)
        self._builder.shutdown(wait=False)
        for entry in self._entries.values():
            entry.release()


def part_of(expert: Expert, tensors: Mapping[str, Mapping[str, Any]] | None = None) -> Part:
    return Part(expert.id, expert.digest, expert.path, tensors or {}, expert.base_model)


def adapter_of(expert: Expert) -> Adapter:
    return Adapter(name=expert.id, path=expert.path, shown=expert.name, digest=expert.digest)


def adapter_for(gate: str, digest: str, path: Path) -> Adapter:
    """No expert's name has a colon, so a composite's is nobody else's."""
    return Adapter(name=f"auto:{gate}@{digest[:12]}", path=path, shown=f"auto:{gate}", digest=digest)


def needed_tensors(
    gate: str, settings: Mapping[str, Any], members: int, general: Part | None = None, compress: int | None = None
) -> tuple[str, ...]:
    """Keys of what a gate needs of every expert beside its weights. Raises CompositeError for wrong settings."""
    return _needed_tensors(gate, json.dumps(settings, sort_keys=True), members, general and general.digest, compress)


@lru_cache(maxsize=256)
def _needed_tensors(
    gate: str, settings: str, members: int, subtracted: str | None, compress: int | None
) -> tuple[str, ...]:
    if gate not in GATES:
        raise CompositeError([f"No gate {gate!r}. There are {', '.join(GATES)}."])
    names = tuple(Member(id=str(k), rows=1) for k in range(max(members, 2)))
    try:
        made = gate_of(Layout(gate=gate, settings=json.loads(settings), members=names))
    except ValueError as error:
        raise CompositeError([f"The settings do not suit the gate {gate!r}: {problems(error)}."]) from error
    general = None if subtracted is None else Part("general", subtracted, Path())
    statistics = statistics_key(made, general=general, compress=compress) if tables_of(made) else None
    return tuple(key for key in (gate if made.extra else None, statistics) if key is not None)


def problems(error: ValueError) -> str:
    """A ValidationError in one line; other errors as they are."""
    listed = error.errors() if hasattr(error, "errors") else None
    if listed is None:
        return str(error)
    return "; ".join(": ".join(filter(None, (".".join(map(str, e["loc"])), e["msg"]))) for e in listed)


def found(store: Store) -> list[Entry]:
    """What earlier processes built, least recently used first; what cannot be read is deleted when it is tidied."""
    entries = []
    for path in sorted(map(store.path, store.digests()), key=lambda path: path.stat().st_mtime):
        layout = layout_of(path)
        members = frozenset(each.id for each in layout.members) if layout else frozenset()
        gate = layout.gate if layout else "unknown"
        entries.append(Entry(adapter_for(gate, path.name, path), members, size(path), doomed=layout is None))
    return entries


def layout_of(folder: Path) -> Layout | None:
    """The layout of a composite's folder, None when there is none that can be read. Blocks."""
    try:
        return Layout.model_validate(json.loads((folder / CONFIG).read_bytes())[KEY])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
