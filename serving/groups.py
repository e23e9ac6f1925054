"""Groups: experts that are alike share composites that are loaded beforehand, so that what stays inside a group costs
no load.

Only public experts are grouped: a composite of a group answers for everybody.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from adapters_registry.errors import RegistryError
from adapters_registry.expert import Expert
from router.adapter import Adapter
from router.composite import CompositeError
from router.decision import Decision, Weighted
from router.gating import GATES
from router.groups import cluster, prototype_similarity, weight_similarity
from router.methods import METHODS
from router.methods.gated import GatedSettings
from serving.engine import EngineError

if TYPE_CHECKING:
    from serving.service import Service

logger = logging.getLogger("moerge")

By = Literal["weights", "prototypes"]
#: Gates that a request's weights mask exactly: an expert with weight 0 has no part in the answer.
MASKED = ("constant", "evidence", "probe")


@dataclass(frozen=True)
class Group:
    """Experts in the order of their names, and the gates whose composite of them is loaded."""

    experts: tuple[Expert, ...]
    gates: dict[str, Decision] = field(default_factory=dict)


class Groups:
    """One for a server. Decisions inside a group use its composites; `build` makes the groups anew."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._by: By | None = service.settings.groups.by
        self._gates: tuple[str, ...] = service.settings.groups.gates
        self._groups: tuple[Group, ...] = ()
        self._members: frozenset[str] = frozenset()  # ids of all that were grouped
        self._held = AsyncExitStack()
        self._building = asyncio.Lock()

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups)

    @property
    def by(self) -> By | None:
        return self._by

    def _public(self) -> list[Expert]:
        return [each for each in self._service.experts(None) if each.visibility == "public"]

    def within(self, decision: Decision) -> Decision:
        """The same decision on a group's composite, when all its experts are in one; otherwise as it is.

        Experts of the group that the decision does not have get weight 0 where the gate reads weights. Other gates
        weigh the whole group, which only decisions of the router may be widened to. A blend that is a weighted sum is
        what the gate `constant` computes, so it needs no adapter of its own.
        """
        if decision.kind == "blend":
            whole = self._around(decision, "constant") if is_sum(decision) else None
            if whole is None:
                return decision
            weighed = {"kind": "gate", "gate": whole.gate, "gate_settings": whole.gate_settings}
            return decision.model_copy(update={**weighed, "experts": masked(whole, decision)})
        if decision.gate is None or decision.general or decision.compress:
            return decision
        if decision.gate not in MASKED and decision.method == "named":
            return decision
        whole = self._around(decision, decision.gate, decision.gate_settings)
        if whole is None:
            return decision
        experts = masked(whole, decision) if decision.gate in MASKED else whole.experts
        return decision.model_copy(update={"experts": experts})

    def _around(self, decision: Decision, gate: str, settings: Mapping[str, object] | None = None) -> Decision | None:
        """The composite for this gate, with these settings, of a group that has all the decision's experts."""
        ids = {each.id for each in decision.experts}
        for group in self._groups:
            whole = group.gates.get(gate)
            if whole is None or settings not in (None, whole.gate_settings):
                continue
            if ids <= {each.id for each in whole.experts} and self._serves(group):
                return whole
        return None

    def _serves(self, group: Group) -> bool:
        """Whether all its experts are still what they were: active, and public."""
        active = (self._service.active(each.name) for each in group.experts)
        return all(
            now is not None and now.id == each.id and now.visibility == "public"
            for now, each in zip(active, group.experts, strict=True)
        )

    def renew(self) -> None:
        """The registry has changed: group its experts anew, if there are groups."""
        if self._changed():
            self._service.spawn(self._renewed())

    def _changed(self) -> bool:
        return self._by is not None and {each.id for each in self._public()} != self._members

    async def _renewed(self) -> None:
        try:
            async with self._building:
                if self._changed():  # not meanwhile seen to
                    await self._build()
        except (RegistryError, EngineError, CompositeError, OSError, ValueError) as error:
            logger.warning("The groups could not be built: %s", error)

    async def build(self, by: By | None = None, gates: Sequence[str] | None = None) -> None:
        """Group all public experts, load the groups' composites, and let go of those before.

        A group whose composite cannot be built or loaded is left without that gate.
        """
        async with self._building:
            self._by = by or self._by or "weights"
            self._gates = tuple(gates or self._gates)
            await self._build()

    async def _build(self) -> None:
        experts = self._public()
        found = await asyncio.to_thread(self._clustered, experts)
        held = AsyncExitStack()
        try:
            groups = tuple([await self._loaded(group, held) for group in found])
        except BaseException:
            await held.aclose()
            raise
        before, self._held = self._held, held
        self._groups, self._members = groups, frozenset(each.id for each in experts)
        await before.aclose()

    def _clustered(self, experts: Sequence[Expert]) -> list[list[Expert]]:
        """Groups of at least two, the largest first, as many as half the engine's room can hold. Blocks."""
        service = self._service
        if len(experts) < 2:
            return []
        if self._by == "prototypes":
            library = service.router.library
            assert library is not None
            rows = {expert.id: vectors for expert, vectors in zip(library.experts, library.sentences, strict=True)}
            experts = [each for each in experts if len(rows.get(each.id, ()))]
            similarity = prototype_similarity([rows[each.id] for each in experts])
        else:
            similarity = weight_similarity([Adapter(each.path) for each in experts])
        extra = any(GATES[gate].extra for gate in self._gates)
        ranks = [each.rank + extra for each in experts]
        settings = service.settings
        found = cluster(similarity, ranks, settings.engine.max_rank, settings.groups.least)
        groups = sorted(([experts[k] for k in group] for group in found if len(group) > 1), key=len, reverse=True)
        return groups[: settings.engine.resident // 2 // max(len(self._gates), 1)]

    async def _loaded(self, experts: Sequence[Expert], held: AsyncExitStack) -> Group:
        """A group with those of its composites that the engine has; `held` keeps them there."""
        members = tuple(Weighted(expert=each.name, id=each.id, weight=1 / len(experts)) for each in experts)
        group = Group(tuple(experts))
        for gate in self._gates:
            chosen = gate_settings(self._service, gate)
            whole = Decision(method="group", kind="gate", experts=members, gate=gate, gate_settings=chosen)
            try:
                await held.enter_async_context(self._service.hold(whole))
                group.gates[gate] = whole
            except (EngineError, CompositeError, RegistryError) as error:
                names = ", ".join(each.name for each in experts)
                logger.warning("The group of %s has no composite for %s: %s", names, gate, error)
        return group

    async def close(self) -> None:
        self._groups = ()
        await self._held.aclose()


def is_sum(decision: Decision) -> bool:
    """Whether a blend is the weighted sum of its experts: `cat`, and `smear` for weights that are a distribution."""
    if decision.operator_settings.get("rank") is not None:
        return False
    weights = [each.weight for each in decision.experts]
    distribution = min(weights) >= 0 and math.isclose(math.fsum(weights), 1)
    return decision.operator == "cat" or (decision.operator == "smear" and distribution)


def masked(whole: Decision, decision: Decision) -> tuple[Weighted, ...]:
    """The experts of a group's composite with the decision's weights, 0 for those that it does not have."""
    weights = {each.id: each.weight for each in decision.experts}
    return tuple(each.model_copy(update={"weight": weights.get(each.id, 0.0)}) for each in whole.experts)


def gate_settings(service: Service, gate: str) -> dict[str, object]:
    """What `auto:<gate>` uses, all defaults included: a group's composite is for the same settings."""
    given = METHODS[gate].Settings.model_validate(service.settings.router.methods.get(gate, {}))
    assert isinstance(given, GatedSettings)
    return dict(GATES[gate].Settings.model_validate(given.gate).model_dump(mode="json"))
