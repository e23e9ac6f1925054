"""`/v1/blends`: store several experts as one model, look blends up, forget them."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any, Literal

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from adapters_registry.blends import Blend, BlendMember, Ingredient
from adapters_registry.expert import Visibility
from adapters_registry.licences import LicenceNote
from serving.auth import Caller
from serving.blends import Wanted, create
from serving.endpoints.common import AdminCaller, InferCaller, ServiceDep
from serving.recipes import engine_name
from serving.service import Service

endpoints = APIRouter(prefix="/v1/blends", tags=["blends"])


class BlendSummary(BaseModel):
    """A stored blend. `model` may be its name, or its id.

    `members` are the experts that it is merged from, `lineage` what the caller made it of. `licence` is the strictest
    of `licences`. `problems` say why it cannot be used now.
    """

    object: Literal["blend"] = "blend"
    name: str | None
    id: str
    digest: str
    operator: str
    settings: dict[str, Any]
    members: list[BlendMember]
    lineage: list[Ingredient]
    report: dict[str, Any]
    search: dict[str, Any]
    owner: str | None
    visibility: Visibility
    description: str
    licence: str | None
    licences: list[LicenceNote]
    created_at: datetime
    loaded: bool
    usable: bool
    problems: list[str]


class BlendList(BaseModel):
    object: Literal["list"] = "list"
    data: list[BlendSummary]


async def summary(service: Service, blend: Blend, caller: Caller) -> BlendSummary:
    problems = blend.problems or await service.blends.problems(blend, caller.tenant)
    fields = blend.model_dump(exclude={"problems", "licences"})
    return BlendSummary(
        **fields,
        id=blend.id,
        licence=blend.licences[0].licence if blend.licences else None,
        licences=list(blend.licences),
        loaded=engine_name(blend.operator, blend.digest) in service.engine.loaded(),
        usable=not problems,
        problems=list(problems),
    )


@endpoints.post("", status_code=201)
async def store_blend(wanted: Wanted, service: ServiceDep, caller: AdminCaller) -> BlendSummary:
    """Merge experts, and blends of experts, into one model, and keep it under a name, or under its content alone.

    Answers when it is built and loaded, or refuses with every reason. It is private when a member is. Members are
    pinned to their active versions.
    """
    # It goes on when the client leaves: it is whole or absent.
    blend = await asyncio.shield(service.spawn(create(service, wanted, caller.tenant)))
    return await summary(service, blend, caller)


@endpoints.get("")
async def list_blends(service: ServiceDep, caller: InferCaller) -> BlendList:
    """The blends that the caller may see, those that cannot be used included."""
    found = await asyncio.to_thread(service.registry.blends.list, caller.tenant)
    return BlendList(data=[await summary(service, each, caller) for each in found])


@endpoints.get("/{reference}")
async def show_blend(reference: str, service: ServiceDep, caller: InferCaller) -> BlendSummary:
    """One blend, by its name, or by its content: `blend:<digest>`, all of it or the first 12 digits."""
    blend = await asyncio.to_thread(service.registry.blends.get, reference, caller.tenant)
    return await summary(service, blend, caller)


@endpoints.delete("/{reference}")
async def remove_blend(reference: str, service: ServiceDep, caller: AdminCaller) -> JSONResponse:
    """Forget a blend; its members stay. Requests that it is answering now are finished."""
    blend = await asyncio.to_thread(service.registry.blends.remove, reference, tenant=caller.tenant)
    await service.refresh()
    return JSONResponse({"object": "blend.deleted", "name": blend.name, "id": blend.id, "deleted": True})
