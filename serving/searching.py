"""A blend whose weights are found on a labelled set, from its members to what the registry stores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapters_registry.blends import BlendMember, Ingredient, NewBlend
from adapters_registry.expert import Expert
from adapters_registry.registry import Registry
from router.blending import Report, blend, blend_digest, lorahub, soup
from router.blending.operators import operator_of
from router.blending.plan import merged
from router.blending.search import Found
from router.composite import Part
from serving.labelled import Judgement
from serving.recipes import part_of

#: Judgement -> what a search makes as small as it can.
COSTS: Mapping[str, Callable[[Judgement], float]] = {
    "likelihood": lambda judged: judged.loss,
    "exact": lambda judged: 1 - judged.exact,
}


@dataclass(frozen=True)
class Mixture:
    """A blend of which all is settled but the weights."""

    experts: Sequence[Expert]
    parts: Sequence[Part]
    operator: str
    settings: Mapping[str, Any]
    max_rank: int

    @classmethod
    def of(
        cls, registry: Registry, names: Sequence[str], operator: str, settings: Mapping[str, Any], max_rank: int
    ) -> Mixture:
        """Raises ExpertNotFound, and BlendError for an operator or settings that do not exist."""
        statistic = operator_of(operator, settings).statistic
        experts = [registry.get(name) for name in names]
        parts = []
        for expert in experts:
            kept = registry.tensors(expert.name, expert.version, statistic) if statistic else None
            parts.append(part_of(expert, {statistic: kept} if statistic and kept else None))
        return cls(experts, parts, operator, settings, max_rank)

    def build(self, weights: Sequence[float], folder: Path) -> Report:
        """Raises BlendError."""
        return blend(folder, self.parts, weights, self.operator, self.settings, max_rank=self.max_rank)

    def stored(self, name: str, weights: Sequence[float], **more: Any) -> NewBlend:
        """What the registry stores; members of weight 0 have no part in it."""
        rows = [row for row in zip(self.experts, self.parts, weights, strict=True) if row[2]]
        parts, shares = merged([part for _, part, _ in rows], [weight for *_, weight in rows])  # as the server will
        return NewBlend(
            name=name,
            digest=blend_digest(parts, shares, self.operator, self.settings, max_rank=self.max_rank),
            members=tuple(
                BlendMember(expert=expert.name, version=expert.version, digest=expert.digest, weight=weight)
                for expert, _, weight in rows
            ),
            lineage=tuple(Ingredient(name=expert.name, id=expert.id, weight=weight) for expert, _, weight in rows),
            operator=self.operator,
            settings=dict(self.settings),
            **more,
        )


@dataclass(frozen=True)
class How:
    """method  a name in `router.blending.SEARCHES`
    metric  a name in COSTS
    steps, seed  of lorahub
    """

    method: str
    metric: str
    steps: int
    seed: int

    def told(self) -> dict[str, Any]:
        """What matters of it, to be kept with what was found."""
        return asdict(self) if self.method == "lorahub" else {"method": self.method, "metric": self.metric}

    def evaluations(self, members: int) -> int:
        """At most so many."""
        return self.steps if self.method == "lorahub" else 2 * members - 1

    def find(self, members: int, judge: Callable[[Sequence[float]], Judgement]) -> Found:
        """Weights (members,). Raises ValueError, and what `judge` raises."""

        def cost(weights: Sequence[float]) -> float:
            return COSTS[self.metric](judge(weights))

        if self.method == "lorahub":
            return lorahub(members, cost, steps=self.steps, seed=self.seed)
        return soup(members, lambda weights: -cost(weights))
