"""Stored blends in the server: what a caller wants becomes one, and one becomes a decision."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from adapters_registry.blends import MOST_MEMBERS, PREFIX, Blend, BlendMember, Ingredient, NewBlend
from adapters_registry.errors import BlendNotFound, BlendRefused, BlendUnusable, ExpertNotFound, Reason
from adapters_registry.expert import Expert, Visibility
from router.blending import LINEAGE, BlendError, Report
from router.blending.flatten import Nested, flatten
from router.blending.operators import operator_of
from router.decision import Decision, Weighted
from serving.engine import EngineUnavailable
from serving.errors import BadRequest
from serving.recipes import problems

if TYPE_CHECKING:
    from serving.service import Service

#: Weights beyond this are a mistake.
LARGEST = 1000.0
#: Settings that may stand beside `settings` as well.
COMMON = ("density", "rank", "seed")


class Wanted(BaseModel):
    """A blend that somebody asks for, of experts and of other blends."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = Field(None, description="Left out: it is only known by its content.", examples=["science"])
    members: dict[str, float] | list[str] = Field(
        description="Names of experts and blends with their weights, or their names.",
        examples=[{"maths": 0.6, "chemistry": 0.4}],
    )
    weights: list[float] | None = Field(None, description="When `members` is a list; left out: equal ones.")
    operator: str = Field("cat", examples=["ties"])
    settings: dict[str, Any] = Field(
        default_factory=dict, description="The operator's own.", examples=[{"density": 0.3}]
    )
    density: float | None = Field(None, description="As in `settings`.")
    rank: int | None = Field(None, description="As in `settings`.")
    seed: int | None = Field(None, description="As in `settings`.")
    description: str = ""
    visibility: Visibility = "public"
    search: dict[str, Any] = Field(default_factory=dict, description="How the weights were found, to be kept with it.")
    replace: bool = Field(False, description="Put it in the place of the caller's blend of that name.")

    @model_validator(mode="after")
    def _said_once(self) -> Wanted:
        if isinstance(self.members, dict) and self.weights is not None:
            raise ValueError("'members' has weights already; send a list of names, or leave 'weights' out")
        if twice := [key for key in COMMON if key in self.settings and getattr(self, key) is not None]:
            raise ValueError(f"'{twice[0]}' is given twice, in 'settings' and beside it")
        return self

    @property
    def all_settings(self) -> dict[str, Any]:
        return self.settings | {key: value for key in COMMON if (value := getattr(self, key)) is not None}

    @property
    def weighed(self) -> list[tuple[str, float]]:
        """Names with weights, as far as both go, and no more of them than a blend may have."""
        if isinstance(self.members, dict):
            return list(self.members.items())[:MOST_MEMBERS]
        names = self.members[:MOST_MEMBERS]
        weights = [1 / max(len(names), 1)] * len(names) if self.weights is None else self.weights
        return list(zip(names, weights, strict=False))

    def reasons(self) -> Iterable[str]:
        """What is wrong with it whatever there is."""
        count = len(self.members)
        if not 1 <= count <= MOST_MEMBERS:
            yield f"A blend has 1 to {MOST_MEMBERS} members, not {count}."
        if self.weights is not None and len(self.weights) != count:
            yield f"There are {count} members and {len(self.weights)} weights; every member needs one."
        if large := [name for name, weight in self.weighed if abs(weight) > LARGEST]:
            yield f"The weight of '{large[0]:.80}' is over {LARGEST:g}; weights are at most that, either way."


class StoredBlends:
    """The registry's blends as they are served: a snapshot, renewed with the experts'."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._blends: tuple[Blend, ...] = ()
        self._called: dict[str, list[Blend]] = {}  # by name, `blend:<12 digits>` and `blend:<digest>`
        self._checked: dict[str, str | None] = {}  # digest -> what is wrong with its content by now

    def renew(self, blends: Sequence[Blend]) -> None:
        """Serve these, as the operator sees them."""
        self._blends = tuple(blends)
        self._called = {}
        for each in blends:
            for reference in {each.name or each.id, each.id, f"{PREFIX}{each.digest}"}:
                self._called.setdefault(reference, []).append(each)
        self._checked = {}

    def visible(self, tenant: str | None) -> list[Blend]:
        """Those that the tenant may see and that can be used, as far as their members are concerned."""
        return [each for each in self._blends if each.visible_to(tenant) and self.members(each, tenant) is not None]

    def find(self, model: str, tenant: str | None) -> Blend | None:
        """A blend by name or by content, if the tenant may see it."""
        found = [each for each in self._called.get(model, ()) if each.visible_to(tenant)]
        return min(found, key=lambda each: (each.owner != tenant, each.name is not None), default=None)

    def members(self, blend: Blend, tenant: str | None) -> list[Expert] | None:
        """The active experts that it was made of; None when they are not all there for the tenant."""
        active = [self._service.active(each.expert) for each in blend.members]
        experts = [each for each in active if each is not None and each.visible_to(tenant)]
        same = [each.digest for each in experts] == [each.digest for each in blend.members]
        return experts if same else None

    async def decision(self, model: str, tenant: str | None) -> Decision | None:
        """That this blend answers; None when there is none, and when what `blend:<digest>` means is no more.

        Raises BlendUnusable for a name whose blend is there and cannot be used.
        """
        if (blend := self.find(model, tenant)) is None:
            return None
        problems = await self.problems(blend, tenant)
        if not problems:
            return self._decided(blend)
        if model.startswith(PREFIX):
            return None
        raise BlendUnusable(blend.label, problems)

    async def problems(self, blend: Blend, tenant: str | None) -> tuple[str, ...]:
        """Why it cannot be used now, as the tenant may know it."""
        if self.members(blend, tenant) is None:
            try:
                stored = await asyncio.to_thread(self._service.registry.blends.get, blend.name or blend.id, tenant)
            except BlendNotFound:
                return ("it was just removed",)
            return stored.problems or ("its members are changing; try again",)
        checked = self._checked
        if blend.digest not in checked:
            checked[blend.digest] = await self._difference(blend)
        problem = checked[blend.digest]
        return () if problem is None else (problem,)

    async def _difference(self, blend: Blend) -> str | None:
        """Whether what would be built now is what was stored: statistics and the engine's rank may have changed."""
        try:
            plan = await self._service.materializer.plan(self._decided(blend))
        except (BlendError, ExpertNotFound) as error:
            return str(error).rstrip(".")
        if plan.digest == blend.digest:
            return None
        return "it would not be what was stored (other statistics of its members, another engine.max_rank or release)"

    def _decided(self, blend: Blend) -> Decision:
        return decided(
            {each.id: (each.expert, each.weight) for each in blend.members},
            blend.operator,
            blend.settings,
            generation=self._service.generation,
        )


def decided(
    members: dict[str, tuple[str, float]], operator: str, settings: dict[str, Any], *, generation: int
) -> Decision:
    """`members`: id -> (name, weight)."""
    return Decision(
        method="named",
        kind="blend",
        experts=tuple(Weighted(expert=name, id=key, weight=weight) for key, (name, weight) in members.items()),
        operator=operator,
        operator_settings=settings,
        confidence=1.0,
        generation=generation,
    )


async def create(service: Service, wanted: Wanted, tenant: str | None) -> Blend:
    """Build what is wanted, have the engine load it, and store it: whole or not at all.

    Raises BlendRefused with every reason, BadRequest for what cannot be stored, and as `Materializer.hold` and
    `Residency.lease` do.
    """
    if service.failure is not None:
        raise EngineUnavailable(service.failure)
    new, decision = await draft(service, wanted, tenant)
    async with service.materializer.hold(decision) as adapter, service.residency.lease(adapter):
        report = await asyncio.to_thread(report_of, adapter.path)
        built = new.model_copy(update={"digest": adapter.digest, "report": report})
        blend = await asyncio.to_thread(service.registry.blends.create, built, replace=wanted.replace)
    await service.refresh()
    return blend


async def draft(service: Service, wanted: Wanted, tenant: str | None) -> tuple[NewBlend, Decision]:
    """What would be stored, its digest and report still missing, and the decision that builds it."""
    found = [Reason("cannot_be_blended", each) for each in wanted.reasons()]
    resolved, experts, unknown = await resolve(service, wanted, tenant)
    found += unknown
    flat: dict[str, float] = {}
    try:
        flat = flatten([(each, weight) for each, weight, _ in resolved], wanted.operator)
    except BlendError as error:
        found += refusals(error)
    new = drafted(wanted, tenant, [(experts[key], weight) for key, weight in flat.items()], resolved)
    members = {key: (experts[key].name, weight) for key, weight in flat.items()}
    decision = decided(members, new.operator, new.settings, generation=service.generation)
    try:
        if flat:
            await service.materializer.plan(decision)
        else:
            operator_of(new.operator, new.settings)
    except BlendError as error:
        found += refusals(error)
    against = await asyncio.to_thread(service.registry.blends.against, new, replace=wanted.replace)
    found += [each for each in against if flat or each.code != "wrong_members"]
    if found:
        raise BlendRefused(wanted.name, list(dict.fromkeys(found)))
    return new, decision


def refusals(error: BlendError) -> list[Reason]:
    return [Reason("cannot_be_blended", each) for each in error.reasons]


Resolved = tuple[str | Nested, float, Ingredient]


async def resolve(
    service: Service, wanted: Wanted, tenant: str | None
) -> tuple[list[Resolved], dict[str, Expert], list[Reason]]:
    """What the names mean to this tenant, the experts that are in it by id, and the names that mean nothing."""
    resolved: list[Resolved] = []
    experts: dict[str, Expert] = {}
    reasons: list[Reason] = []
    for name, weight in wanted.weighed:
        expert = service.active(name)
        if expert is not None and expert.visible_to(tenant):
            experts[expert.id] = expert
            resolved.append((expert.id, weight, ingredient(name, expert.id, weight)))
            continue
        blend = service.blends.find(name, tenant)
        troubles = () if blend is None else await service.blends.problems(blend, tenant)
        if blend is None or (troubles and name.startswith(PREFIX)):
            known = [each.name for each in service.experts(tenant)]
            known += [each.name for each in service.blends.visible(tenant) if each.name]
            reasons.append(Reason("unknown_member", str(ExpertNotFound(name[:200], known=known))))
        elif troubles:
            reasons.append(Reason("member_inactive", str(BlendUnusable(blend.label, troubles))))
        else:
            members = service.blends.members(blend, tenant) or []
            experts |= {each.id: each for each in members}
            nested = Nested(name, {each.id: each.weight for each in blend.members}, blend.operator, blend.settings)
            resolved.append((nested, weight, ingredient(name, blend.id, weight)))
    return resolved, experts, reasons


def ingredient(name: str, content: str, weight: float) -> Ingredient:
    return Ingredient(name=name, id=content, weight=finite(weight))


def finite(weight: float) -> float:
    """What is no number is refused, with every other reason, and until then it is none."""
    return weight if math.isfinite(weight) else 0.0


def drafted(
    wanted: Wanted, tenant: str | None, members: Sequence[tuple[Expert, float]], resolved: Sequence[Resolved]
) -> NewBlend:
    """Raises BadRequest for what cannot be stored."""
    try:
        return NewBlend(
            name=wanted.name,
            digest="0" * 64,
            members=tuple(
                BlendMember(expert=each.name, version=each.version, digest=each.digest, weight=finite(weight))
                for each, weight in members
            ),
            operator=wanted.operator,
            settings=wanted.all_settings,
            owner=tenant,
            visibility=wanted.visibility,
            description=wanted.description,
            search=wanted.search,
            lineage=tuple(each for _, _, each in resolved),
        )
    except ValidationError as error:
        raise BadRequest(f"{problems(error)}.") from error


def report_of(folder: Path) -> dict[str, Any]:
    """What a blend became, from its lineage. Blocks."""
    lineage = json.loads((folder / LINEAGE).read_bytes())
    return {field.name: lineage[field.name] for field in fields(Report)}
