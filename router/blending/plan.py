"""May these members be blended? Every reason against it, and if there is none, what is to be computed."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from router.adapter import Adapter
from router.blending.cat import Cat
from router.blending.errors import BlendError
from router.blending.operator import BlendSettings, Operator, Share
from router.blending.operators import operator_of
from router.composite.membership import common_shapes, different_bases, listing, read_members, unpaired
from router.composite.part import Part

#: Operators that mean something for a single member, too.
UNMERGED = ("task_arithmetic", "layer_swap")


class Source(Adapter):
    """A member's folder; its factors come as they are stored, mapped from the file, so that nothing is copied."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.adapted = self.names.A.keys() & self.names.B.keys()

    def stored(self, module: str) -> tuple[Tensor, Tensor]:
        """B (d_out, r), A (r, d_in)"""
        B, A = (self._file.get_tensor(side[module][0]) for side in (self.names.B, self.names.A))
        return B, A


@dataclass(frozen=True, eq=False)
class Member:
    part: Part
    weight: float
    source: Source


@dataclass(frozen=True, eq=False)
class Plan:
    """A blend that can be made.

    operator  what merges: `cat` for a single member, where there is nothing to merge
    members   in the order of their content, so that the order in which they were named does not matter
    modules   module -> (d_out, d_in), the union over all members, sorted
    limit     the rank that no module may exceed
    """

    operator: Operator
    members: Sequence[Member]
    modules: Mapping[str, tuple[int, int]]
    limit: int

    def rows(self, module: str) -> int:
        """The rank rows that one module will have."""
        operator = self.operator
        if operator.exact:
            ranks = {m.part.id: m.source.rank(module) for m in self.members if module in m.source.adapted}
            return min(operator.rows(module, ranks), self.limit)
        natural: int = operator.settings.rank or operator.rows(module, self.ranks)
        return min(natural, self.limit, *self.modules[module])

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Every member's largest rank."""
        return {m.part.id: max(map(m.source.rank, m.source.adapted)) for m in self.members}

    def shares(self, module: str) -> list[Share]:
        """What the members bring to a module: those that adapt it, or have a statistic that speaks of it."""
        found = []
        d_out, d_in = self.modules[module]
        for member in self.members:
            part = member.part
            statistic = part.tensors.get(self.operator.statistic or "", {}).get(module)
            adapts = module in member.source.adapted
            if not adapts and statistic is None:
                continue
            B, A = member.source.stored(module) if adapts else (torch.zeros(d_out, 0), torch.zeros(0, d_in))
            found.append(
                Share(
                    id=part.id,
                    weight=member.weight,
                    B=B,
                    A=A,
                    scale=member.source.config.scaling(module),
                    seed=mask_seed(getattr(self.operator.settings, "seed", 0), part.digest, module),
                    statistic=None if statistic is None else torch.as_tensor(statistic),
                )
            )
        return found


def merged(parts: Sequence[Part], weights: Sequence[float]) -> tuple[list[Part], list[float]]:
    """The same adapter under several names is one member, with their weights added up; the first name stays."""
    first: dict[str, Part] = {}
    total: dict[str, float] = {}
    for part, weight in zip(parts, weights, strict=True):
        first.setdefault(part.digest, part)
        total[part.digest] = total.get(part.digest, 0.0) + weight
    return list(first.values()), list(total.values())


def mask_seed(seed: int, digest: str, module: str) -> int:
    """63 bits that depend on the seed, the member's content and the module, not on who else is in the blend."""
    key = hashlib.sha256(f"{seed}\0{digest}\0{module}".encode()).digest()
    return int.from_bytes(key[:8], "big") >> 1


def make_plan(
    parts: Sequence[Part], weights: Sequence[float], operator: str, settings: Mapping[str, Any], max_rank: int
) -> Plan:
    """Raises BlendError with every reason."""
    reasons = [*_membership(parts), *check_weights(parts, weights)]
    chosen: Operator | None = None
    try:
        chosen = operator_of(operator, settings)
    except BlendError as error:
        reasons += error.reasons
    named, broken = read_members(parts, lambda part: Source(part.path))
    reasons += broken
    if chosen is None or reasons:
        raise BlendError(reasons)
    weighed = dict(zip((part.id for part in parts), weights, strict=True))
    modules, conflicts = common_shapes(named)
    reasons += [*different_bases(named), *_unsupported(named), *conflicts]
    reasons += chosen.refuse(weighed, list(modules))
    reasons += _rank(chosen.settings, max_rank)
    reasons += _statistics(chosen, named, modules)
    if reasons:
        raise BlendError(reasons)
    merging, members = _merging(chosen, operator, named, weights)
    adapted = {module: shape for module, shape in modules.items() if any(module in m.source.adapted for m in members)}
    return Plan(merging, members, adapted, chosen.settings.rank or max_rank)


def _merging(
    chosen: Operator, name: str, named: Sequence[tuple[Part, Source]], weights: Sequence[float]
) -> tuple[Operator, list[Member]]:
    """What merges, and the members that take part, in the order of their content."""
    members = [
        Member(part, float(weight), source)
        for (part, source), weight in zip(named, chosen.weigh(weights), strict=True)
        if weight != 0
    ]
    if len(members) == 1 and name not in UNMERGED:
        only = replace(members[0], weight=chosen.alone(members[0].weight))
        return Cat(BlendSettings(rank=chosen.settings.rank)), [only]
    return chosen, sorted(members, key=lambda member: (member.part.digest, member.part.id))


def _membership(parts: Sequence[Part]) -> Iterator[str]:
    if not parts:
        yield "A blend needs at least one member; it got none."
    for name, count in Counter(part.id for part in parts).items():
        if count > 1:
            yield f"Expert '{name}' occurs {count} times; add its weights up."


def check_weights(parts: Sequence[Part], weights: Sequence[float]) -> Iterator[str]:
    if len(weights) != len(parts):
        yield f"There are {len(parts)} members and {len(weights)} weights; every member needs one."
        return
    for part, weight in zip(parts, weights, strict=True):
        if not math.isfinite(weight):
            yield f"'{part.id}' has weight {weight}; weights are finite numbers."
    if parts and not any(weights):
        yield "All weights are zero, so nothing would be left; ask for the base model instead."


def _unsupported(named: Sequence[tuple[Part, Source]]) -> Iterator[str]:
    for part, source in named:
        if not source.adapted:
            yield f"'{part.id}' adapts no module; there is nothing to blend."
        if source.names.embeddings:
            yield f"'{part.id}' adapts embeddings, which cannot be blended; serve it alone."
        if source.names.unexpected:
            yield f"'{part.id}' has more than plain LoRA factors: {listing(source.names.unexpected)}."
        yield from unpaired(part, source)


def _rank(settings: BlendSettings, max_rank: int) -> Iterator[str]:
    if max_rank < 1:
        yield f"The engine's largest rank is {max_rank}; a blend needs at least 1."
    elif settings.rank is not None and settings.rank > max_rank:
        yield f"rank {settings.rank} is over the engine's limit of {max_rank}; without `rank` the blend is cut to fit."


def _statistics(
    operator: Operator, named: Sequence[tuple[Part, Source]], modules: Mapping[str, tuple[int, int]]
) -> Iterator[str]:
    """Statistics that the operator needs and a member does not bring, or brings in the wrong shape."""
    kind = operator.statistic
    if kind is None:
        return
    for part, source in named:
        stored = part.tensors.get(kind)
        if stored is None:
            name = part.id.partition("@")[0]
            yield f"'{part.id}' carries no '{kind}' statistics; measure them with `moerge expert stats {name}`."
            continue
        if missing := sorted(source.adapted - stored.keys()):
            yield f"'{part.id}' lacks the '{kind}' statistics of {listing(missing)}; compute them again."
        for module in sorted(stored.keys() & modules.keys()):
            d_out, d_in = modules[module]
            shape = (d_in, d_in) if kind == "gram" else (d_out, d_in)
            tensor = torch.as_tensor(stored[module])
            if tuple(tensor.shape) != shape:
                yield f"'{part.id}' has '{kind}' of shape {tuple(tensor.shape)} for {module}; it should be {shape}."
            elif not bool(tensor.isfinite().all()):
                yield f"'{part.id}' has '{kind}' with NaN or infinite elements for {module}; compute them again."
