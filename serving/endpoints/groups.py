"""`/v1/groups`: experts whose composites are loaded beforehand."""

from __future__ import annotations

import asyncio
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from router.gating import GATES
from serving.endpoints.common import AdminCaller, InferCaller, ServiceDep
from serving.errors import BadRequest, Forbidden
from serving.groups import By
from serving.service import Service

endpoints = APIRouter(prefix="/v1/groups", tags=["gates"])


class GroupSummary(BaseModel):
    """Experts of one group, the gates whose composite of them is loaded, and the rank rows they take together."""

    object: Literal["group"] = "group"
    experts: list[str]
    gates: list[str]
    rank: int


class GroupList(BaseModel):
    """`by`: what the experts are compared by; None: there are no groups."""

    object: Literal["list"] = "list"
    by: By | None
    data: list[GroupSummary]


class GroupRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    by: By | None = Field(None, description="Compare weights, or prototypes (their samples); as before when left out.")
    gates: list[str] | None = Field(None, description="Gates to load a composite for; as before when left out.")


def listed(service: Service) -> GroupList:
    groups = [
        GroupSummary(
            experts=[each.name for each in group.experts],
            gates=list(group.gates),
            rank=sum(each.rank for each in group.experts),
        )
        for group in service.groups
    ]
    return GroupList(by=service.groups.by, data=groups)


@endpoints.get("")
async def show_groups(service: ServiceDep, caller: InferCaller) -> GroupList:
    """The groups that there are now; only public experts are in any."""
    return listed(service)


@endpoints.post("/build")
async def build_groups(body: GroupRequest, service: ServiceDep, caller: AdminCaller) -> GroupList:
    """Group the experts anew and load the groups' composites; from then on whenever the registry changes."""
    if caller.tenant is not None:
        raise Forbidden("Groups are for everybody; building them needs a key of the owner 'operator'.")
    if unknown := sorted(set(body.gates or ()) - set(GATES)):
        raise BadRequest(f"No gate {', '.join(unknown):.200}; there are {', '.join(GATES)}.", param="gates")
    await asyncio.shield(service.spawn(service.groups.build(body.by, body.gates)))
    return listed(service)
