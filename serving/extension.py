"""`moerge: {...}` in a request's body: who should answer, weighed or merged how, and whether to keep a trace."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator, model_validator

from adapters_registry.errors import ExpertNotFound
from router.blending.operators import operator_of
from router.blending.plan import UNMERGED
from router.decision import Decision, Verdict, Weighted
from router.gating import GATES
from serving.errors import BadRequest
from serving.recipes import problems

if TYPE_CHECKING:
    from serving.auth import Caller
    from serving.service import Service

#: Names of `vllm_xargs` that the server alone sends to its engine.
OURS = "moerge_"
#: Experts that one request may name.
MOST = 64
#: Weights beyond this are a mistake.
LARGEST = 1000.0


class Extension(BaseModel):
    """experts   these answer, by name, instead of those that the router finds; or {name: weight}
    gate      how they are weighed: a gate's name; left out, by the weights given, or equally
    operator  or how they are merged into one: an operator's name; without `experts`, how the router's mixture is
    settings  the gate's or the operator's own
    general   for a gate: an expert of general knowledge, by name, that is subtracted from each (GenKnowSub)
    compress  cut each to so many of its strongest directions, so that more of them fit
    trace     keep which experts each layer and token used: GET /v1/traces/<decision>
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    experts: dict[str, FiniteFloat | None] = Field(default_factory=dict)
    gate: str | None = None
    operator: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    general: str | None = None
    compress: int | None = Field(default=None, ge=1)
    trace: bool = False

    @field_validator("experts", mode="before")
    @classmethod
    def _names_or_weights(cls, value: Any) -> Any:
        if isinstance(value, list):
            if not all(isinstance(each, str) for each in value):
                raise ValueError("a list of names, or an object of names and weights")
            if len(set(value)) < len(value):
                raise ValueError("an expert occurs twice")
            value = dict.fromkeys(value)
        if isinstance(value, dict) and not 1 <= len(value) <= MOST:
            raise ValueError(f"name 1 to {MOST} experts")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Extension:
        if self.gate is not None and self.gate not in GATES:
            raise ValueError(f"no gate {self.gate!r:.80}; there are {', '.join(GATES)}")
        if self.gate is not None and self.operator is not None:
            raise ValueError("'gate' weighs experts for every token, 'operator' merges them: name only one")
        if self.settings and self.gate is None and self.operator is None:
            raise ValueError("'settings' are a gate's or an operator's: name it in 'gate' or 'operator'")
        if (self.general or self.compress) and not self.experts:
            raise ValueError("'general' and 'compress' prepare 'experts': name them")
        if self.general in self.experts:
            raise ValueError("an expert cannot be subtracted from itself")
        if self.operator is not None:
            operator_of(self.operator, self.settings)
            if self.general or self.compress:
                raise ValueError("'general' and 'compress' prepare experts for a gate, not for an operator")
        elif self.gate is not None:
            GATES[self.gate].Settings.model_validate(self.settings)
        return self

    @model_validator(mode="after")
    def _weights_that_suit(self) -> Extension:
        if self.weights is not None:
            if len(self.weights) < len(self.experts):
                raise ValueError("give every expert a weight, or none")
            if max(map(abs, self.weights)) > LARGEST:
                raise ValueError(f"weights are at most {LARGEST:g}, either way")
            if self.operator is not None:
                if not any(self.weights):
                    raise ValueError("all weights are zero, so nothing would be left: ask for the base model instead")
                return self
            if not GATES[self.chosen_gate].takes_weights and self.chosen_gate != "probe":
                raise ValueError(f"the gate {self.gate!r} finds its weights itself: give 'experts' as a list")
            if self.chosen_gate != "constant" and min(self.weights) <= 0:
                raise ValueError("a prior's weights must be above 0")
        return self

    @property
    def plain(self) -> bool:
        """Whether the router is left to decide."""
        return self.model_copy(update={"trace": False}) == Extension()

    @property
    def chosen_gate(self) -> str:
        return self.gate or "constant"

    @property
    def weights(self) -> list[float] | None:
        given = [each for each in self.experts.values() if each is not None]
        return given or None

    def full_settings(self) -> dict[str, Any]:
        settings = GATES[self.chosen_gate].Settings.model_validate(self.settings)
        return dict(settings.model_dump(mode="json"))

    def decision(self, service: Service, caller: Caller) -> Decision:
        """The caller's own decision. Raises ExpertNotFound, also for another tenant's private expert.

        Without an operator it is a constant gate's: whatever the weights, they share one composite, and travel with
        the request.
        """
        visible = {expert.name: expert for expert in service.experts(caller.tenant)}
        for name in [*self.experts, *filter(None, [self.general])]:
            if name not in visible:
                raise ExpertNotFound(name, known=sorted(visible))
        given = self.weights or [1 / len(self.experts)] * len(self.experts)
        prior = self.operator is None and self.chosen_gate != "constant"
        total = math.fsum(given) if prior else 1.0  # a prior's weights add up to 1
        weights = dict(zip(self.experts, given, strict=True))
        experts = tuple(
            Weighted(expert=name, id=visible[name].id, weight=weights[name] / total) for name in sorted(self.experts)
        )
        made = Decision(method="named", kind="select", experts=experts, confidence=1.0, generation=service.generation)
        unmerged = self.operator not in UNMERGED and self.settings.get("rank") is None
        if len(experts) == 1 and experts[0].weight == 1 and unmerged:
            return made
        if self.operator is not None:
            return made.model_copy(
                update={"kind": "blend", "operator": self.operator, "operator_settings": self.settings}
            )
        return made.model_copy(
            update={
                "kind": "gate",
                "gate": self.chosen_gate,
                "gate_settings": self.full_settings(),
                "verdict": Verdict() if self.chosen_gate == "probe" else None,
                "general": visible[self.general].id if self.general else None,
                "compress": self.compress,
            }
        )

    def applied(self, decision: Decision, service: Service) -> Decision:
        """The router's decision with the operator, or the gate's settings, that the request asks for.

        Raises BadRequest.
        """
        if self.operator is not None:
            if not service.router.mixes(decision.method):
                raise BadRequest(
                    f"'moerge.operator' merges several experts, and '{decision.method}' is not set to: name them in "
                    "'moerge.experts', or set its top_k.",
                    param="moerge",
                )
            if decision.kind != "blend":
                return decision  # nobody else is near enough
            return decision.model_copy(update={"operator": self.operator, "operator_settings": self.settings})
        if self.gate is not None and decision.method != self.gate:
            raise BadRequest(
                f"'model' asks for '{decision.method}' and 'moerge.gate' for '{self.gate}'.", param="moerge"
            )
        if decision.gate is None or decision.gate != self.gate or not self.settings:
            return decision
        return decision.model_copy(update={"gate_settings": self.full_settings()})


def take_extension(body: dict[str, Any]) -> tuple[dict[str, Any], Extension]:
    """The body without `moerge`, and what that says. Raises BadRequest."""
    arguments = body.get("vllm_xargs") or {}
    if not isinstance(arguments, dict):
        raise BadRequest(f"'vllm_xargs' must be an object; got {arguments!r:.80}.", param="vllm_xargs")
    if ours := sorted(key for key in arguments if key.startswith(OURS)):
        raise BadRequest(
            f"'vllm_xargs' must not have {', '.join(ours)[:200]}: use 'moerge' instead.", param="vllm_xargs"
        )
    if "moerge" not in body:
        return body, Extension()
    rest = {key: value for key, value in body.items() if key != "moerge"}
    try:
        return rest, Extension.model_validate(body["moerge"])
    except ValidationError as error:
        raise BadRequest(f"'moerge': {problems(error)}.", param="moerge") from error
