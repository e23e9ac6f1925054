"""What can be built from experts for the engine: composites, which a gate weighs, and blends.

A recipe is all that decides what is built, but for what is stored with its experts; equal recipes are one.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from adapters_registry.expert import Expert
from adapters_registry.lora import CONFIG
from router.blending import LINEAGE, OPERATORS, BlendError, Report, blend, blend_digest
from router.blending.checking import check_blend, read_lineage
from router.blending.plan import make_plan as plan_blend
from router.blending.plan import merged
from router.composite import CompositeError, Part, check_composite, compose, composite_digest, statistics_key
from router.composite import plan as plan_composite
from router.composite.statistics import tables_of
from router.decision import Decision
from router.gating import GATES, gate_of
from router.gating.layout import KEY, Layout, Member
from serving import metrics
from serving.engine import Adapter

#: What is raised, with every reason, for experts that do not go together.
Refused = (CompositeError, BlendError)

Kind = Literal["composite", "blend"]
Tensors = Callable[[Expert, str], Mapping[str, Any] | None]
Stored = Mapping[str, Mapping[str, Mapping[str, Any]]]  # expert's id -> key -> tensors


@dataclass(frozen=True, eq=False)
class Given:
    """What somebody brings in place of what is stored with the experts. Like nothing but itself."""

    stored: Stored


@dataclass(frozen=True, eq=False)
class Pantry:
    """What recipes are made from: experts by id, what is stored with them, and the rank that the engine takes."""

    find: Callable[[str], Expert]
    tensors: Tensors
    max_rank: int

    def part(self, expert_id: str, keys: Sequence[str] = ()) -> Part:
        expert = self.find(expert_id)
        kept = {key: tensors for key in keys if (tensors := self.tensors(expert, key)) is not None}
        return part_of(expert, kept)


@dataclass(frozen=True, eq=False)
class Plan:
    """A recipe that can be made, and the name of what it makes.

    `build` fills an empty folder, and gives what a person should know about it.
    """

    digest: str
    build: Callable[[Path], Sequence[str]]


@dataclass(frozen=True)
class Recipe(ABC):
    """`members` are the experts without which the result means nothing, by id; `reads` all that are read."""

    kind: ClassVar[Kind]

    members: tuple[str, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return self.members

    @property
    def slow(self) -> bool:
        """Whether building can take minutes on a large model: others do not wait for it."""
        return False

    @abstractmethod
    def adapter(self, digest: str, folder: Path) -> Adapter:
        """What the engine is told to load."""

    @abstractmethod
    def plan(self, pantry: Pantry) -> Plan:
        """Cheap, but reads files. Raises CompositeError or BlendError with every reason against it."""

    @abstractmethod
    def check(self, folder: Path) -> None:
        """Raises CompositeError or BlendError when the folder is damaged."""

    @abstractmethod
    def count(self, outcome: str) -> None:
        """Note in the metrics that it was built, or found."""


@dataclass(frozen=True)
class CompositeRecipe(Recipe):
    """`settings` are JSON, the gate's own; the rest as in a Decision."""

    kind: ClassVar[Kind] = "composite"

    gate: str
    settings: str
    general: str | None = None
    compress: int | None = None
    given: Given | None = None

    @property
    def reads(self) -> tuple[str, ...]:
        return (*self.members, *filter(None, [self.general]))

    def adapter(self, digest: str, folder: Path) -> Adapter:
        return composite_adapter(self.gate, digest, folder)

    def plan(self, pantry: Pantry) -> Plan:
        gate, settings = self.gate, json.loads(self.settings)
        general = None if self.general is None else pantry.part(self.general)
        keys = needed_tensors(gate, settings, len(self.members), general, self.compress)
        parts = [self._part(pantry, each, keys) for each in self.members]
        prepared: dict[str, Any] = {"general": general, "compress": self.compress}
        plan_composite(parts, gate, settings, max_rank=pantry.max_rank, **prepared)  # raises every reason against it
        digest = composite_digest(parts, gate, settings, **prepared)

        def build(folder: Path) -> Sequence[str]:
            return compose(folder, parts, gate, settings, max_rank=pantry.max_rank, **prepared).notes

        return Plan(digest, build)

    def _part(self, pantry: Pantry, expert_id: str, keys: Sequence[str]) -> Part:
        if self.given is None:
            return pantry.part(expert_id, keys)
        return part_of(pantry.find(expert_id), self.given.stored[expert_id])

    def check(self, folder: Path) -> None:
        check_composite(folder)

    def count(self, outcome: str) -> None:
        metrics.COMPOSITES.labels(self.gate, outcome).inc()


@dataclass(frozen=True)
class BlendRecipe(Recipe):
    """Members in the order of their ids; `settings` are JSON, the operator's own."""

    kind: ClassVar[Kind] = "blend"

    weights: tuple[float, ...]
    operator: str
    settings: str

    @property
    def slow(self) -> bool:
        """Operators that form matrices (d_out, d_in)."""
        return self.operator != "svd" and not OPERATORS[self.operator].exact

    def adapter(self, digest: str, folder: Path) -> Adapter:
        return blend_adapter(self.operator, digest, folder)

    def plan(self, pantry: Pantry) -> Plan:
        settings, limit = json.loads(self.settings), pantry.max_rank
        statistic = getattr(OPERATORS.get(self.operator), "statistic", None)
        keys = () if statistic is None else (statistic,)
        parts, weights = merged([pantry.part(each, keys) for each in self.members], self.weights)
        plan_blend(parts, weights, self.operator, settings, limit)  # raises every reason against it
        digest = blend_digest(parts, weights, self.operator, settings, max_rank=limit)

        def build(folder: Path) -> Sequence[str]:
            inner = folder / "blend"  # what `blend` drafts beside it goes with the folder, whatever happens
            report = blend(inner, parts, weights, self.operator, settings, max_rank=limit)
            for file in inner.iterdir():
                file.rename(folder / file.name)
            inner.rmdir()
            return [described(report)]

        return Plan(digest, build)

    def check(self, folder: Path) -> None:
        lineage = check_blend(folder)
        if lineage.digest != folder.name:
            raise BlendError([f"{folder.name}: {LINEAGE} is of another blend, {lineage.digest}"])

    def count(self, outcome: str) -> None:
        metrics.BLENDS.labels(self.operator, outcome).inc()


def recipe_of(decision: Decision, given: Stored | None = None) -> Recipe:
    """What a `gate` or `blend` decision asks for."""
    if decision.kind == "blend":
        experts = sorted(decision.experts, key=lambda each: each.id)
        return BlendRecipe(
            members=tuple(each.id for each in experts),
            weights=tuple(each.weight for each in experts),
            operator=decision.operator or "cat",
            settings=json.dumps(decision.operator_settings, sort_keys=True),
        )
    assert decision.kind == "gate"
    assert decision.gate is not None
    return CompositeRecipe(
        members=tuple(each.id for each in decision.experts),
        gate=decision.gate,
        settings=json.dumps(decision.gate_settings, sort_keys=True),
        general=decision.general,
        compress=decision.compress,
        given=None if given is None else Given(given),
    )


def described(report: Report) -> str:
    if not report.cut:
        return f"rank {report.rank} in {report.modules} modules, nothing discarded."
    return (
        f"rank {report.rank}; {report.cut} of {report.modules} modules were cut to it, which discards "
        f"{report.discarded:.2%} of their energy (squared Frobenius norm), {report.worst:.2%} in the worst."
    )


def part_of(expert: Expert, tensors: Mapping[str, Mapping[str, Any]] | None = None) -> Part:
    return Part(expert.id, expert.digest, expert.path, tensors or {}, expert.base_model)


# Names: no expert's has a colon, so that what is built is never taken for one.


def expert_adapter(expert: Expert) -> Adapter:
    return Adapter(name=expert.id, path=expert.path, shown=expert.name, digest=expert.digest)


def composite_adapter(gate: str, digest: str, path: Path) -> Adapter:
    return Adapter(name=f"auto:{gate}@{digest[:32]}", path=path, shown=f"auto:{gate}", digest=digest)


def blend_adapter(operator: str, digest: str, path: Path) -> Adapter:
    """Shown by its content, which is also how a stored blend may be asked for."""
    return Adapter(name=engine_name(operator, digest), path=path, shown=blend_name(digest), digest=digest)


def engine_name(operator: str, digest: str) -> str:
    """128 bits: what a blend is made of is up to its caller, who must not find another's name."""
    return f"blend:{operator}@{digest[:32]}"


def blend_name(digest: str) -> str:
    return f"blend:{digest[:12]}"


# What is on disk


@dataclass(frozen=True)
class Kept:
    """What a folder says it holds: of which kind, under which name, made from which experts (ids)."""

    kind: Kind
    adapter: Adapter
    members: frozenset[str]


def kept(folder: Path) -> Kept | None:
    """None when that cannot be read. Blocks."""
    if (layout := layout_of(folder)) is not None:
        adapter = composite_adapter(layout.gate, folder.name, folder)
        return Kept("composite", adapter, frozenset(each.id for each in layout.members))
    try:
        lineage = read_lineage(folder)
    except BlendError:
        return None
    adapter = blend_adapter(lineage.operator, folder.name, folder)
    return Kept("blend", adapter, frozenset(each.id for each in lineage.members))


def layout_of(folder: Path) -> Layout | None:
    """The layout of a composite's folder, None when there is none that can be read. Blocks."""
    try:
        return Layout.model_validate(json.loads((folder / CONFIG).read_bytes())[KEY])
    except (OSError, ValueError, KeyError, TypeError):
        return None


# What gates need


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
