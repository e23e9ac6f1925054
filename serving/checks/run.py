"""A check from its start to the stored report."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from adapters_registry.errors import VersionNotFound
from adapters_registry.expert import Expert, Sample, State
from adapters_registry.prototypes import prototypes_of
from router.encoder import Vectors
from router.errors import NotReady
from router.joining import Joining, joining
from router.library import Library
from serving.checks import triggers
from serving.checks.asking import Asker, Question
from serving.checks.declared import declared
from serving.checks.others import Regression, confusion
from serving.checks.own_task import OwnTask
from serving.checks.report import KEY, CheckNotFound, Report, Section, read_report
from serving.checks.weights import duplicates, loud
from serving.engine import EngineUnavailable
from serving.recipes import expert_adapter

if TYPE_CHECKING:
    from serving.service import Service

#: Told of every stage (wait, weights, route, ask, neutral, done) with a fraction in [0, 1].
Progress = Callable[[str, float], None]

NOTES = (
    "Its samples may have been its training data; then its score on them is too good.",
    "Compared with the experts that its owner may see.",
    "Passing proves nothing about a back door whose trigger nobody but its author knows.",
)


class Checks:
    """One for a server. Checks take turns, so that requests keep most of the engine."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._turn = asyncio.Lock()

    async def run(self, version: Expert, progress: Progress) -> Report:
        """Check a version and keep the report with it.

        Raises EngineUnavailable, AdapterLoadFailed, NotReady, and VersionNotFound when it is removed meanwhile.
        """
        service = self._service
        if service.failure is not None:
            raise EngineUnavailable(service.failure)
        progress("wait", 0.0)
        async with self._turn:
            if service.calibration.stopping:
                raise EngineUnavailable("The server is stopping.")
            try:
                async with service.residency.lease(expert_adapter(version)):
                    report = await self._measure(version, progress)
            except (FileNotFoundError, VersionNotFound):
                raise VersionNotFound(version.name, version.version) from None
            finally:
                active = service.active(version.name)
                if active is None or active.id != version.id:
                    await service.residency.release(version.id)
            await asyncio.to_thread(service.registry.measured.put, version, KEY, report.model_dump(mode="json"))
        progress("done", 1.0)
        return report

    async def report(self, version: Expert) -> Report:
        """The latest. Raises CheckNotFound."""
        report = read_report(await asyncio.to_thread(self._service.registry.measured.get, version, KEY))
        if report is None:
            raise CheckNotFound(version)
        return report

    async def _measure(self, version: Expert, progress: Progress) -> Report:
        service, settings = self._service, self._service.settings.checks
        library = service.router.library
        if library is None:
            raise NotReady
        visible = {k.name: k for k, seen in zip(library.experts, library.visible(version.owner), strict=True) if seen}
        active = visible.pop(version.name, None)
        peers = list(visible.values())
        weights = await asyncio.to_thread(self._weights, version, peers, lambda done: progress("weights", done))
        progress("route", 0.0)
        joined = await asyncio.to_thread(self._joining, library, version)
        active = None if active is None or active.id == version.id else active
        answers = await self._answers(version, active, joined, visible, progress)
        neutral = await self._neutral(version, peers, lambda done: progress("neutral", done))
        own, regression = answers
        return Report(
            name=version.name,
            version=version.version,
            digest=version.digest,
            generation=library.generation,
            method=service.router.settings.method,
            sections=(own, confusion(joined, settings.max_confusion), regression, *weights[:2], neutral, weights[2]),
            notes=NOTES,
        )

    def _weights(
        self, version: Expert, peers: Sequence[Expert], tell: Callable[[float], None]
    ) -> tuple[Section, Section, Section]:
        """What needs no engine. Blocks."""
        settings, registry = self._service.settings.checks, self._service.registry
        return (
            duplicates(version, peers, settings.max_cosine, lambda done: tell(done / 2)),
            loud(version, peers, registry.measured, settings.max_loudness, lambda done: tell((1 + done) / 2)),
            declared(version, registry.base),
        )

    def _joining(self, library: Library, version: Expert) -> Joining:
        """Blocks."""
        router, settings = self._service.router, self._service.settings
        return joining(
            library,
            version,
            self._prototypes(version),
            router.settings.method,
            router.settings.methods[router.settings.method],
            encoder=router.encoder_id,
            among=library.visible(version.owner),
            most=settings.checks.samples,
        )

    def _prototypes(self, version: Expert) -> Vectors:
        router = self._service.router
        stored = self._service.registry.prototypes(router.encoder_id, [version.id])
        return stored[version.id] if version.id in stored else prototypes_of(version, router.embed)

    async def _answers(
        self, version: Expert, active: Expert | None, joined: Joining, peers: dict[str, Expert], progress: Progress
    ) -> tuple[Section, Section]:
        """Who answers what exactly: on its own samples, and on those that would move to it."""
        settings, asker = self._service.settings.checks, Asker(self._service)
        samples = [sample for sample in version.samples if sample.answer is not None][: settings.samples]
        serving = peers if active is None else {**peers, active.name: active}
        names = await asyncio.to_thread(self._answer_now, version, samples, list(serving))
        own = OwnTask(version, active, samples, [None if name is None else serving[name] for name in names])
        regression = Regression.of(version, joined, peers)
        questions = [(who, Question.of(sample)) for who, sample in (*own.pairs(), *regression.pairs())]
        await asker.ask(questions, lambda done: progress("ask", done))
        return own.section(asker.score, settings.min_gain), regression.section(asker.score, settings.max_regression)

    def _answer_now(self, version: Expert, samples: Sequence[Sample], serving: Sequence[str]) -> list[str | None]:
        """Which of those that serve now the router sends each to; of several the first, None: nobody. Blocks."""
        router = self._service.router
        decisions = (router.route_sync(each.prompt, tenant=version.owner, allowed=serving) for each in samples)
        return [each.experts[0].expert if each.experts else None for each in decisions]

    async def _neutral(self, version: Expert, peers: Sequence[Expert], tell: Callable[[float], None]) -> Section:
        measured, usual = self._service.registry.measured, triggers.chosen(peers)
        known = await asyncio.to_thread(triggers.known, usual, measured)
        unknown = [peer for peer in usual if peer.id not in known]
        mine, found = await triggers.shifts(Asker(self._service), version, unknown, tell)
        await asyncio.to_thread(triggers.keep, unknown, found, measured)
        return triggers.section(mine, [*known.values(), *found.values()], self._service.settings.checks.max_shift)


def to_check(versions: Sequence[Expert], number: int | None) -> Expert:
    """Of a name's versions: the one asked for, else the latest staged one, else the active one.

    Raises VersionNotFound.
    """
    if number is None:
        wanted = [each for state in (State.STAGED, State.ACTIVE) for each in reversed(versions) if each.state is state]
    else:
        wanted = [each for each in versions if each.version == number]
    if not wanted:
        raise VersionNotFound(versions[0].name, number, [f"{each.version} ({each.state})" for each in versions])
    return wanted[0]
