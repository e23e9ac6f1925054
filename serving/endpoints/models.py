"""`/v1/models`: everything that can stand in `model`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from adapters_registry.blends import PREFIX, Blend
from adapters_registry.expert import Expert
from serving.deciding import AUTO
from serving.endpoints.common import InferCaller, ServiceDep
from serving.errors import ModelNotFound
from serving.service import Service

endpoints = APIRouter(tags=["models"])


def cards(service: Service, tenant: str | None) -> list[dict[str, Any]]:
    base = service.engine.base_model
    routed = [AUTO, *(f"{AUTO}:{method}" for method in service.router.methods)]
    return [
        *(card(name, parent=base) for name in routed),
        card(base, parent=None),
        *(expert_card(expert, base) for expert in service.experts(tenant)),
        *{blend.label: blend_card(blend, base) for blend in service.blends.visible(tenant)}.values(),
    ]


def card(name: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "moerge",
        "root": parent or name,
        "parent": parent,
    }


def expert_card(expert: Expert, base: str) -> dict[str, Any]:
    return {
        **card(expert.name, parent=base),
        "created": int(expert.created_at.timestamp()),
        "owned_by": expert.owner or "moerge",
        "root": expert.id,
    }


def blend_card(blend: Blend, base: str) -> dict[str, Any]:
    return {
        **card(blend.label, parent=base),
        "created": int(blend.created_at.timestamp()),
        "owned_by": blend.owner or "moerge",
        "root": blend.id,
    }


@endpoints.get("/v1/models")
async def list_models(service: ServiceDep, caller: InferCaller) -> dict[str, Any]:
    """The router's names, the base model, and experts and stored blends with the base model as `parent`."""
    return {"object": "list", "data": cards(service, caller.tenant)}


@endpoints.get("/v1/models/{name:path}")
async def show_model(name: str, service: ServiceDep, caller: InferCaller) -> dict[str, Any]:
    """One of them, or OpenAI's 404."""
    for each in cards(service, caller.tenant):
        if each["id"] == name:
            return each
    if name.startswith(PREFIX) and await service.blends.decision(name, caller.tenant) is not None:
        return {**card(name, parent=service.engine.base_model), "root": name}
    raise ModelNotFound(name)
