"""What an expert's scores are on prompts that it is not for, measured once through the engine and kept with it.

A z-score (s - mean) / deviation says how unusually high a score is for this expert in this module, so that loud
experts do not win everything. The base model reads the prompts, with the experts looking on: a probe's weights are 0.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import re
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from adapters_registry.errors import ExpertNotFound, VersionNotFound
from adapters_registry.expert import Expert
from router.composite import CompositeError
from router.decision import Decision, Weighted
from router.gating.evidence import SCORES
from serving import metrics
from serving.engine import EngineUnavailable, Trace
from serving.internal import one_token, post
from serving.neutral import NEUTRAL
from serving.recipes import layout_of, needed_tensors, part_of

if TYPE_CHECKING:
    from serving.service import Service

logger = logging.getLogger("moerge")

#: Prompts read for an expert at most, how many are read at once, and under how many of its own library's the
#: packaged ones join in.
PROMPTS, WIDTH, FEW = 100, 8, 16
#: Smallest deviation: of a score that is the same for every token.
FLOOR = 1e-6

Tensors = dict[str, NDArray[np.float32]]


class Calibration:
    """One for a server. `ensure` is quick when there is nothing to measure."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._known: set[tuple[str, str]] = set()  # (expert's id, key) that are stored
        self._used: set[str] = set()  # keys that somebody has needed: new experts are measured for them
        self._turns: dict[str, asyncio.Lock] = {}
        self.stopping = False

    async def ensure(self, decision: Decision) -> None:
        """Measure what the decision's gate needs of its experts and is not stored yet.

        Raises CompositeError for scores that cannot be measured, EngineUnavailable.
        """
        assert decision.gate is not None
        general = None if decision.general is None else part_of(self._service.expert(decision.general))
        settings, K = decision.gate_settings, len(decision.experts)
        for key in needed_tensors(decision.gate, settings, K, general, decision.compress):
            if not key.startswith("statistics/"):
                continue
            members = [self._service.expert(each.id) for each in decision.experts]
            if any((each.id, key) not in self._known for each in members):
                await asyncio.shield(self._service.spawn(self.measure(members, key)))
            if key not in self._used:
                self._used.add(key)
                self._service.spawn(self._rest(key))

    def renew(self) -> None:
        """The registry has changed: forget who left, measure who came."""
        active = {expert.id for expert in self._service.experts(None)}
        self._known = {(name, key) for name, key in self._known if name in active}
        for key in self._used:
            self._service.spawn(self._rest(key))

    async def _rest(self, key: str) -> None:
        """Everybody else, in the background."""
        try:
            experts = [each for each in self._service.experts(None) if (each.id, key) not in self._known]
            await self.measure(experts, key)
        except (EngineUnavailable, CompositeError, ExpertNotFound) as error:
            logger.warning("Some experts could not be calibrated for %s: %s", key, error)

    async def measure(
        self, experts: Sequence[Expert], key: str, *, prompts: Sequence[str] | None = None, again: bool = False
    ) -> list[str]:
        """Measure these experts' scores and store them, those that have it already only when `again`.

        `prompts` are neutral for them; left out, the other experts' samples are. Gives the names measured.
        """
        score = score_of(key)
        general = self._general(score)
        experts = [each for each in experts if general is None or each.digest != general.digest]
        async with self._turns.setdefault(key, asyncio.Lock()):
            missing = experts if again else await asyncio.to_thread(self._without, experts, key)
            measured = []
            for batch in self._batches(missing, score, general):
                if self.stopping:
                    break
                for expert, tensors in (await self._batch(batch, key, (score, general), prompts)).items():
                    if expert not in missing:
                        continue  # it was there to make a composite of two
                    await asyncio.to_thread(self._store, expert, key, tensors)
                    measured.append(expert.name)
        self._service.materializer.renew()
        return measured

    def _without(self, experts: Sequence[Expert], key: str) -> list[Expert]:
        """Those for whom nothing is stored under the key. Blocks."""
        found = []
        for expert in experts:
            try:
                if key in self._service.registry.tensor_keys(expert.name, expert.version):
                    self._known.add((expert.id, key))
                else:
                    found.append(expert)
            except (ExpertNotFound, VersionNotFound):  # removed meanwhile
                continue
        return found

    def _store(self, expert: Expert, key: str, tensors: Tensors) -> None:
        try:
            self._service.registry.set_tensors(expert.name, expert.version, key, tensors)
            self._known.add((expert.id, key))
            metrics.CALIBRATIONS.inc()
        except (ExpertNotFound, VersionNotFound):
            logger.info("%s was removed while it was being calibrated.", expert.id)

    def _general(self, score: Score) -> Expert | None:
        """The expert that is subtracted before this score is taken."""
        if score.general is None:
            return None
        for expert in self._service.experts(None):
            if expert.digest.startswith(score.general):
                return expert
        raise CompositeError([f"The expert {score.general}, which is to be subtracted, is not active."])

    def _batches(self, experts: Sequence[Expert], score: Score, general: Expert | None) -> Iterator[list[Expert]]:
        """Experts that fit one composite, at least two: somebody else joins one that is left alone."""

        def rows(expert: Expert) -> int:
            rank = expert.rank + (general.rank if general else 0)
            return min(rank, score.compress or rank)

        limit = self._service.settings.engine.max_rank
        left = list(experts)
        while left:
            batch: list[Expert] = []
            for expert in [*left, *self._service.experts(None)]:
                enough = expert not in left and len(batch) > 1
                taken = any(expert.digest == other.digest for other in [*batch, general] if other is not None)
                if not enough and not taken and sum(map(rows, batch)) + rows(expert) <= limit:
                    batch.append(expert)
            if len(batch) > 1:
                yield sorted(batch, key=lambda each: each.name)
            left = [each for each in left[1:] if each not in batch]

    async def _batch(
        self, batch: list[Expert], key: str, what: tuple[Score, Expert | None], prompts: Sequence[str] | None
    ) -> dict[Expert, Tensors]:
        """Statistics of these experts' scores. A centred score needs the centre first, which takes a second pass."""
        read = {each: list(prompts) if prompts else self.neutral(each) for each in batch}
        score, general = what
        probe = Decision(
            method="calibration",
            kind="gate",
            experts=tuple(Weighted(expert=each.name, id=each.id, weight=1 / len(batch)) for each in batch),
            gate="probe",
            gate_settings={**score.settings, "centred": False},
            general=general.id if general else None,
            compress=score.compress,
        )
        found = await self._pass(batch, probe, read)
        if score.settings["centred"]:
            given = {expert.id: {key: provisional(tensors)} for expert, tensors in found.items()}
            centred = probe.model_copy(update={"gate_settings": score.settings})
            second = await self._pass(batch, centred, read, given)
            for expert, tensors in second.items():
                tensors |= {name: value for name, value in found[expert].items() if name.endswith(".centre")}
            found = second
        return found

    def neutral(self, expert: Expert) -> list[str]:
        """Samples of other experts that its owner may see; too few, and packaged prompts join them."""
        own = {sample.prompt for sample in expert.samples}
        tenant = "" if expert.owner is None or expert.visibility == "public" else expert.owner
        others = {sample.prompt for each in self._service.experts(tenant) for sample in each.samples} - own
        if len(others) > PROMPTS:
            return sorted(random.Random(0).sample(sorted(others), PROMPTS))
        return sorted(others | set(NEUTRAL)) if len(others) < FEW else sorted(others)

    async def _pass(
        self,
        batch: list[Expert],
        probe: Decision,
        read: Mapping[Expert, Sequence[str]],
        given: Mapping[str, Any] | None = None,
    ) -> dict[Expert, Tensors]:
        """Let the base model read every prompt that is for one of them; each counts those that are for it."""
        sums = [Sums(rows=slice(0)) for _ in batch]
        async with self._composite(probe, given) as (name, folder):
            layout = await asyncio.to_thread(layout_of, folder)
            assert layout is not None
            for k, start in enumerate(layout.starts):
                sums[k].rows = slice(start, start + layout.blocks[k])
            width = asyncio.Semaphore(WIDTH)

            async def one(prompt: str) -> None:
                async with width:
                    trace = None if self.stopping else await self._moments(name, prompt)
                for k, expert in enumerate(batch):
                    if trace is not None and prompt in wanted[expert]:
                        sums[k].add(trace.moments, k)

            wanted = {expert: frozenset(prompts) for expert, prompts in read.items()}
            await asyncio.gather(*(one(prompt) for prompt in sorted(frozenset().union(*wanted.values()))))
        if self.stopping:
            raise EngineUnavailable("The server is stopping.")
        return {expert: total.statistics() for expert, total in zip(batch, sums, strict=True)}

    @asynccontextmanager
    async def _composite(self, decision: Decision, given: Mapping[str, Any] | None) -> AsyncIterator[tuple[str, Path]]:
        service = self._service
        async with service.materializer.hold(decision, given) as adapter, service.residency.lease(adapter):
            yield adapter.name, adapter.path

    async def _moments(self, name: str, prompt: str) -> Trace | None:
        """What one prompt left, as a chat where the model has a template for that; None when it does not suit."""
        engine = self._service.engine
        for path, body in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": prompt}]}),
            ("/v1/completions", {"prompt": prompt}),
        ):
            key = f"calibration-{uuid.uuid4().hex}"
            arguments = {"moerge_trace": key, "moerge_collect": "moments"}
            response = await post(engine, path, one_token(path, body, name, arguments))
            trace = await engine.trace(key)
            if response.status_code >= 500:
                raise EngineUnavailable(f"The engine could not read a neutral prompt: {response.text:.300}")
            if response.status_code == 200:
                return trace
        return None


@dataclass(eq=False)
class Sums:
    """Sums over tokens for one member, of each module: how many, its score, the score's square, and its rows of z."""

    rows: slice

    def __post_init__(self) -> None:
        self._sums: dict[str, list[NDArray[np.float64]]] = {}

    def add(self, moments: Mapping[str, Any], k: int) -> None:
        for name in moments:
            module, _, kind = name.rpartition(".")
            if kind != "count":
                continue
            new = [np.asarray(moments[f"{module}.{each}"], np.float64) for each in ("count", "score", "square", "z")]
            new = [*(each[k] for each in new[:3]), new[3][self.rows]]
            old = self._sums.get(module)
            self._sums[module] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]

    def statistics(self) -> Tensors:
        """`<module>.mean`, `.deviation` (), `.centre` (rows,). Raises CompositeError when nothing could be read."""
        found: Tensors = {}
        for module, (count, score, square, z) in self._sums.items():
            if count > 0:
                mean = score / count
                deviation = math.sqrt(max(float(square / count - mean**2), 0.0))
                found[f"{module}.mean"] = np.array(mean, np.float32)
                found[f"{module}.deviation"] = np.array(max(deviation, FLOOR), np.float32)
                found[f"{module}.centre"] = (z / count).astype(np.float32)
        if not found:
            raise CompositeError(["No neutral prompt could be read by the engine, so nothing could be calibrated."])
        return found


def provisional(tensors: Tensors) -> Tensors:
    """With the centre that is known, and z-scores that change nothing."""
    neutral = {"mean": 0.0, "deviation": 1.0}
    return {
        name: value if (kind := name.rpartition(".")[2]) == "centre" else np.array(neutral[kind], np.float32)
        for name, value in tensors.items()
    }


@dataclass(frozen=True)
class Score:
    """What a key's statistics are of: `settings` of a probe with this score, before any z-score; how its experts are
    prepared: `general` begins the digest of the expert that is subtracted, `compress` is what is kept of them.
    """

    settings: dict[str, Any]
    general: str | None = None
    compress: int | None = None


def score_of(key: str) -> Score:
    """Raises CompositeError for a score that no probe has."""
    pattern = r"statistics/\w+/([a-z]+)(?:-(\d+))?(-centred)?(?:-minus-([0-9a-f]+))?(?:-rank-(\d+))?"
    match = re.fullmatch(pattern, key)
    if match is None or match[1] not in SCORES:
        raise CompositeError([f"'{key}' cannot be measured through the engine; z-scores are for {', '.join(SCORES)}."])
    settings: dict[str, Any] = {"score": match[1], "normalise": "none", "centred": match[3] is not None}
    if match[2] is not None:
        settings["k_gate"] = int(match[2])
    return Score(settings, match[4], int(match[5]) if match[5] else None)
