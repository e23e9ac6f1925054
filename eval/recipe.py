"""Who answers a prompt, in words that a request can carry: what a router's decision comes down to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from router.decision import Decision


class Recipe(BaseModel):
    """base    the base model
    select  one expert
    blend   experts merged by an operator, with weights
    gate    experts weighed token by token, by a gate; their weights are what it starts from, if it takes any
    model   whatever the endpoint calls so: "auto", a stored blend, another server's model

    `experts` are (name, weight) by name; two recipes that are equal have the same answers.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["base", "select", "blend", "gate", "model"] = "base"
    experts: tuple[tuple[str, float], ...] = ()
    operator: str | None = None
    gate: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    general: str | None = None
    compress: int | None = None
    model: str | None = None

    def __hash__(self) -> int:
        return hash((self.kind, self.experts, self.operator, self.gate, self.general, self.compress, self.model))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.experts)

    @classmethod
    def expert(cls, name: str) -> Self:
        return cls(kind="select", experts=((name, 1.0),))

    @classmethod
    def blend(
        cls, weights: Mapping[str, float], operator: str = "cat", settings: Mapping[str, Any] | None = None
    ) -> Self:
        """One expert with weight 1 is that expert, where the operator changes nothing; none is the base model."""
        from router.blending.plan import UNMERGED  # PyTorch: seconds, which tables of figures need not wait for

        kept = tuple(sorted((name, float(weight)) for name, weight in weights.items() if weight))
        settings = dict(settings or {})
        if not kept:
            return cls()
        if len(kept) == 1 and kept[0][1] == 1 and operator not in UNMERGED and settings.get("rank") is None:
            return cls.expert(kept[0][0])
        return cls(kind="blend", experts=kept, operator=operator, settings=settings)

    @classmethod
    def of(cls, decision: Decision) -> Self:
        """What a server would do for this decision; experts by name, so ids must name them as `name@digest`."""
        weights = tuple(sorted((each.expert, each.weight) for each in decision.experts))
        match decision.kind:
            case "base":
                return cls()
            case "select":
                return cls.expert(weights[0][0])
            case "blend":
                assert decision.operator is not None
                return cls.blend(dict(weights), decision.operator, decision.operator_settings)
            case "gate":
                assert decision.gate is not None
                return cls(
                    kind="gate",
                    experts=weights if weighed(decision.gate) else tuple((name, 1.0) for name, _ in weights),
                    gate=decision.gate,
                    settings=decision.gate_settings,
                    general=decision.general.rpartition("@")[0] if decision.general else None,
                    compress=decision.compress,
                )

    def request(self, base: str) -> dict[str, Any]:
        """`model`, and the field `moerge` where one is needed. `base` is what the endpoint calls the base model."""
        match self.kind:
            case "base":
                return {"model": base}
            case "select":
                return {"model": self.experts[0][0]}
            case "model":
                return {"model": self.model}
        weighed_here = self.kind == "blend" or (self.gate is not None and weighed(self.gate))
        moerge: dict[str, Any] = {"experts": dict(self.experts) if weighed_here else list(self.names)}
        named = {"operator": self.operator, "gate": self.gate, "general": self.general, "compress": self.compress}
        moerge |= {key: value for key, value in named.items() if value is not None}
        if self.settings:
            moerge["settings"] = self.settings
        return {"model": "auto", "moerge": moerge}


def weighed(gate: str) -> bool:
    """Whether a gate takes weights for its experts: as they are, or as its prior."""
    from router.gating import GATES

    return GATES[gate].takes_weights or gate == "probe"


def uniform(names: Sequence[str], operator: str = "cat", settings: Mapping[str, Any] | None = None) -> Recipe:
    """Equal weights that add up to 1."""
    return Recipe.blend({name: 1 / len(names) for name in names}, operator, settings)
