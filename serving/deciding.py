"""Who answers a request: whom its `model` or its field `moerge` names, or whom the router decides on."""

from __future__ import annotations

import logging
from typing import Any

from adapters_registry.errors import ExpertNotFound, StoreFull
from router.blending import BlendError
from router.composite import CompositeError
from router.decision import Decision, Weighted
from router.errors import UnknownMethod
from router.text import routing_text
from serving import metrics
from serving.auth import Caller
from serving.conversations import Turn
from serving.engine import AdapterLoadFailed
from serving.errors import BadRequest, ModelNotFound
from serving.extension import Extension
from serving.service import Service

logger = logging.getLogger("moerge.request")

AUTO = "auto"
NAMED = "named"
#: What can go wrong with a decision that the base model can make up for.
FAILURES = (AdapterLoadFailed, CompositeError, BlendError, ExpertNotFound, StoreFull)


async def decide(
    service: Service,
    model: str,
    body: dict[str, Any],
    caller: Caller,
    *,
    extension: Extension | None = None,
    limit: int | None = 5,
    turn: Turn | None = None,
    live: bool = False,
) -> Decision:
    """The decision for this `model`: the router's for `auto`, the caller's own for anything else.

    `limit` is how many candidates the router lists, None all; `turn` is the request's place in a conversation; a
    `live` request is going to be answered, so that it matters who is loaded.
    Raises ModelNotFound, also for another tenant's private expert.
    """
    extension = extension or Extension()
    if extension.experts:
        if model != AUTO:
            raise BadRequest(f"'moerge.experts' answer instead of '{model:.80}': send 'model': 'auto'.", param="moerge")
        return extension.decision(service, caller)
    if is_routed(model):
        before = service.conversations.before(turn)
        decision = await routed(service, model, body, caller, extension, limit if before is None else None)
        if turn is not None and before is not None:
            return service.conversations.settled(turn, before, decision, caller.tenant, limit)
        return service.near_ties.settled(decision) if live and extension.plain else decision
    if extension.gate is not None or extension.operator is not None:
        what = "gate" if extension.gate is not None else "operator"
        raise BadRequest(f"'moerge.{what}' needs 'model': 'auto'; '{model:.80}' answers itself.", param="moerge")
    return await named(service, model, caller)


async def routed(
    service: Service, model: str, body: dict[str, Any], caller: Caller, extension: Extension, limit: int | None
) -> Decision:
    """What the router decides, for `auto` and `auto:<method>`."""
    method = model.removeprefix(AUTO).removeprefix(":") or extension.gate
    if model == f"{AUTO}:":
        raise ModelNotFound(model)
    try:
        text = read_text(service, body)
        decision = await service.router.route(text, method=method, tenant=caller.tenant, limit=limit)
    except UnknownMethod as error:
        raise ModelNotFound(model if extension.gate is None else f"{AUTO}:{extension.gate}") from error
    metrics.ROUTE_SECONDS.labels(decision.method).observe(decision.timings.get("total", 0.0) / 1e3)
    return extension.applied(decision, service)


def is_routed(model: str) -> bool:
    return model == AUTO or model.startswith(f"{AUTO}:")


async def turn_of(
    service: Service, model: str, body: dict[str, Any], caller: Caller, extension: Extension
) -> Turn | None:
    """The request's place in a conversation, where the router is left to decide."""
    if not is_routed(model) or not extension.plain:
        return None
    return await service.conversations.turn(model, body, caller.tenant)


def read_text(service: Service, body: dict[str, Any]) -> str:
    """What the router reads of a request."""
    return routing_text(body, service.settings.router.budget)


async def named(service: Service, model: str, caller: Caller) -> Decision:
    """Whom the client chose: the base model, an expert by name, or a stored blend."""
    decision = Decision(method=NAMED, kind="base", confidence=1.0, generation=service.generation)
    if model == service.engine.base_model:
        return decision
    expert = service.active(model)
    if expert is None or not expert.visible_to(caller.tenant):
        if (blended := await service.blends.decision(model, caller.tenant)) is not None:
            return blended
        raise ModelNotFound(model)
    experts = (Weighted(expert=expert.name, id=expert.id),)
    return decision.model_copy(update={"kind": "select", "experts": experts})


def requested_model(body: dict[str, Any]) -> str:
    """The `model` of a request; left out, the router decides."""
    model = body.get("model", AUTO)
    if model is None:
        return AUTO
    if not isinstance(model, str) or not model:
        raise BadRequest(f"'model' must be a model's name, for example 'auto'; got {model!r:.80}.", param="model")
    return model


def fallen_back(decision: Decision, error: Exception) -> Decision:
    """The base model answers instead, for this reason."""
    logger.warning("%s: %s The base model answers instead.", decision.id, error)
    for each in decision.experts:
        metrics.FALLBACKS.labels(each.expert).inc()
    return decision.model_copy(
        update={
            "kind": "base",
            "experts": (),
            "operator": None,
            "operator_settings": {},
            "gate": None,
            "gate_settings": {},
            "verdict": None,
            "general": None,
            "compress": None,
            "reason": str(error),
        }
    )
