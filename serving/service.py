"""Everything a running server shares: registry, router, engine, and what keeps them in step."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from adapters_registry.errors import ExpertNotFound, RegistryError
from adapters_registry.expert import Expert
from adapters_registry.registry import Registry
from router.decision import Decision
from router.router import Router
from router.versions import RouterVersions
from serving import metrics
from serving.auth import Authenticator
from serving.blends import StoredBlends
from serving.calibration import Calibration
from serving.checks.run import Checks
from serving.config import Settings
from serving.conversations import Conversations, NearTies
from serving.engine import Engine
from serving.feedback import Feedback
from serving.groups import Groups
from serving.materializer import Materializer
from serving.residency import Residency
from serving.traces import Traces

logger = logging.getLogger("moerge")

T = TypeVar("T")

#: How often changes by other processes are looked for, and the engine's health (seconds).
WATCH = 1.0
#: How long a version that left the registry can still answer what was decided before (seconds).
GRACE = 30.0
#: Longest pause between two attempts to restart a dead engine (seconds).
LONGEST_PAUSE = 60.0


class Service:
    """Built at the edge and passed inwards: `Service(settings, registry, router, engine)`."""

    def __init__(self, settings: Settings, registry: Registry, router: Router, engine: Engine) -> None:
        self.settings = settings
        self.registry = registry
        self.router = router
        self.engine = engine
        self.residency = Residency(engine, settings.engine.resident)
        self.materializer = Materializer(
            registry.store.root.with_name("built"),
            find=self.expert,
            tensors=lambda expert, key: registry.tensors(expert.name, expert.version, key),
            max_rank=settings.engine.max_rank,
            max_bytes=int(settings.engine.built_mb * 2**20),
        )
        self.blends = StoredBlends(self)
        self.calibration = Calibration(self)
        self.groups = Groups(self)
        self.checks = Checks(self)
        self.traces = Traces()
        self.feedback = Feedback(settings.feedback, registry.decisions, router)
        self.conversations = Conversations(settings.router.stickiness, self.active, router.standing)
        self.near_ties = NearTies(settings.router.near_tie, engine.loaded, self.active, router.standing)
        self.authenticator = Authenticator(registry.keys, always=not settings.server.loopback)
        self.versions = RouterVersions(registry.store.root.with_name("routers"))
        self.problems: tuple[str, ...] = ()  # what is wrong with what the router learned, and what is used instead
        self._stamp: bytes | None = None  # of the router version that is served
        self.failure: str | None = "The engine is still starting; try again in a few seconds."
        self.preparing: str | None = "The experts are being registered."
        self.generation = -1
        self._active: dict[str, Expert] = {}
        self._by_id: dict[str, Expert] = {}  # the active ones, and those that left within GRACE
        self._left: dict[str, float] = {}  # id -> when it left
        self._refreshing = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._work: set[asyncio.Task[Any]] = set()

    def start(self, warm_up: Callable[[], Awaitable[object]], on_fatal: Callable[[Exception], object]) -> None:
        """Begin to serve: the engine comes up behind `/ready` while `/health` answers already.

        `warm_up` runs once the engine answers, before the server calls itself ready; `on_fatal` is told when
        the first start fails.
        """
        self._tasks = [
            asyncio.create_task(self._run_engine(warm_up, on_fatal)),
            asyncio.create_task(self._watch()),
            asyncio.create_task(self.feedback.run()),
        ]

    async def stop(self) -> None:
        self.calibration.stopping = True
        await asyncio.gather(*self._work, return_exceptions=True)  # registrations finish: whole or absent
        await self.feedback.flush()  # before its task is cancelled, which might be writing
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.groups.close()
        await self.materializer.close()
        await self.engine.stop()
        self.router.close()
        await asyncio.to_thread(self.registry.close)

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run to the end even when whoever asked goes away; `stop` waits for it."""
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._work.discard(task)
        if not task.cancelled():
            task.exception()  # seen: whoever asked is told, or has gone away

    # What answers

    def active(self, name: str) -> Expert | None:
        """The active version of a name, from the snapshot that is being served."""
        return self._active.get(name)

    def expert(self, expert_id: str) -> Expert:
        """An expert of the served snapshot by id. Raises ExpertNotFound when it was just taken away."""
        try:
            return self._by_id[expert_id]
        except KeyError:
            raise ExpertNotFound(expert_id.partition("@")[0]) from None

    def experts(self, tenant: str | None) -> list[Expert]:
        return [expert for expert in self._active.values() if expert.visible_to(tenant)]

    def knows(self, model: str, tenant: str | None) -> bool:
        """Whether this tenant can name `model` itself: the base model, an expert or a blend that it may see."""
        expert = self.active(model)
        if model == self.engine.base_model or (expert is not None and expert.visible_to(tenant)):
            return True
        return self.blends.find(model, tenant) is not None

    @contextlib.asynccontextmanager
    async def hold(self, decision: Decision) -> AsyncIterator[str]:
        """Have what answers a decision loaded for the block; gives the engine's name for it.

        Raises AdapterLoadFailed, EngineUnavailable, CompositeError, BlendError, ExpertNotFound, StoreFull.
        """
        if decision.kind == "base":
            yield self.engine.base_model
            return
        if decision.kind == "gate":
            await self.calibration.ensure(decision)
        async with self.materializer.hold(decision) as adapter, self.residency.lease(adapter):
            yield adapter.name

    # Keeping in step

    async def refresh(self) -> None:
        """Serve the registry as it is now; requests in flight finish with what they were decided on."""
        async with self._refreshing:
            generation, experts = await asyncio.to_thread(self._refit)
            blends = await asyncio.to_thread(self.registry.blends.list)
            active = {expert.id: expert for expert in experts}
            now = time.monotonic()
            self._left = {key: self._left.get(key, now) for key in self._by_id if key not in active}
            self._by_id = {**self._by_id, **active}
            self._active = {expert.name: expert for expert in experts}
            self.generation = generation
            self.materializer.renew()
            self.blends.renew(blends)
            self.calibration.renew()
            if self.preparing is None:
                self.groups.renew()
        metrics.EXPERTS.set(len(self._active))
        metrics.GENERATION.set(self.generation)

    def _refit(self) -> tuple[int, list[Expert]]:
        """Fit the router to the registry: its generation and its active experts. Blocks."""
        generation = self.registry.generation()
        experts = self.registry.experts()
        known = self.registry.prototypes(self.router.encoder_id)
        stamp, active = self.versions.stamp(), self.versions.active()
        library = self.router.refresh(experts, generation, prototypes=known, learned=active.learned)
        for problem in set(active.problems) - set(self.problems):
            logger.warning(problem)
        self._stamp, self.problems = stamp, active.problems
        metrics.ROUTER_VERSION.set(active.learned.number)
        for expert, vectors in zip(library.experts, library.registered, strict=True):
            if expert.id not in known and len(vectors):
                with contextlib.suppress(RegistryError):  # changed meanwhile: the next refresh sees it
                    self.registry.set_prototypes(expert.name, expert.version, self.router.encoder_id, vectors)
        return generation, experts

    def _current(self) -> tuple[int, bytes]:
        """The registry's generation and the router version that should be served. Blocks."""
        return self.registry.generation(), self.versions.stamp()

    async def _clear(self) -> None:
        """Unload what left longer than GRACE ago, and delete the files that nobody needs any more."""
        late = [key for key, when in self._left.items() if time.monotonic() - when > GRACE]
        for key in late:
            del self._left[key]
            del self._by_id[key]
            await self.residency.release(key)
        if self.generation >= 0:  # before the first refresh nobody is known
            gone = self.materializer.forget(lambda member: member not in self._by_id)
            for name in [*gone, *self.materializer.excess()]:
                await self.residency.release(name)
            await self.materializer.tidy(self.residency.names() | self.engine.loaded())
        if late:
            left = {self._by_id[key].digest for key in self._left}
            needed = left | self.residency.digests() | self.materializer.digests()
            await asyncio.to_thread(self.registry.collect, needed)

    async def _watch(self) -> None:
        """Follow changes that other processes make to the registry, and to what the router learned."""
        while True:
            await asyncio.sleep(WATCH)
            try:
                if await asyncio.to_thread(self._current) != (self.generation, self._stamp):
                    await self.refresh()
                await self._clear()
            except Exception:
                logger.exception("The registry could not be followed; the last known experts are served.")
            metrics.RESIDENT.set(len(self.engine.loaded()))
            metrics.LOADS.set(self.residency.loads)

    # The engine's life

    async def _run_engine(
        self, warm_up: Callable[[], Awaitable[object]], on_fatal: Callable[[Exception], object]
    ) -> None:
        """Start the engine, and start it again whenever it dies. Only a failure of the first start is fatal."""
        try:
            await self.engine.start()
            await self.refresh()
            self.failure = None
            await warm_up()
        except Exception as error:
            self.failure = f"The engine did not start: {error}"
            on_fatal(error)
            return
        self.preparing = None
        self.groups.renew()
        while True:
            metrics.READY.set(1)
            while (trouble := await self.engine.health()) is None:
                await asyncio.sleep(WATCH)
            metrics.READY.set(0)
            self.failure = f"{trouble} It is being restarted."
            logger.error(self.failure)
            await self._restart_engine()

    async def _restart_engine(self) -> None:
        pause = WATCH
        while self.failure is not None:
            try:
                await self.engine.stop()
                await self.engine.start()
                self.failure = None
                logger.warning("The engine is back.")
            except Exception as error:
                logger.error("The engine did not start again: %s. Next try in %.0f s.", error, pause)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
