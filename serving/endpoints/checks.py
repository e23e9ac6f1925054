"""`/v1/experts/{name}/check`: what a version adds, whom it changes, what gets worse."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query

from adapters_registry.expert import Expert, State
from serving.auth import Caller
from serving.checks import policy
from serving.checks.report import Report
from serving.checks.run import to_check
from serving.endpoints.common import AdminCaller, InferCaller, ServiceDep
from serving.endpoints.streams import Told
from serving.service import Service

endpoints = APIRouter(prefix="/v1/experts", tags=["experts"])

Number = Annotated[int | None, Query(ge=1, description="The latest staged version, else the active one.")]


class CheckReport(Report):
    """A report, and what is made of it now.

    state               of the version
    current_generation  of the registry
    stale               the registry has changed since the report was made, so that it may not hold any more
    """

    state: State
    current_generation: int
    stale: bool
    ruling: policy.Ruling


def shown(service: Service, expert: Expert, report: Report) -> CheckReport:
    return CheckReport(
        **dict(report),
        state=expert.state,
        current_generation=service.generation,
        stale=report.generation != service.generation,
        ruling=policy.ruling(report, service.settings.checks),
    )


async def version_of(service: Service, name: str, number: int | None, caller: Caller) -> Expert:
    """The version that is meant. Raises ExpertNotFound, VersionNotFound, and NotOwner for other tenants."""
    versions = await asyncio.to_thread(service.registry.versions, name, caller.tenant)
    return policy.owned(to_check(versions, number), caller.tenant)


@endpoints.post("/{name}/check", response_model=CheckReport)
async def check_expert(
    name: str,
    service: ServiceDep,
    caller: AdminCaller,
    version: Number = None,
    stream: Annotated[bool, Query(description="Report progress as server-sent events.")] = False,
) -> Any:
    """Check a version through the engine and the router, and keep the report with it; for its owner and the operator.

    With `?stream=true`: events `progress` (`{"stage", "fraction"}`), then one `check` or one `error`.
    """
    expert = await version_of(service, name, version, caller)
    told = Told()
    # It goes on when the client leaves: its report is whole or absent.
    task = service.spawn(service.checks.run(expert, told.progress))
    if stream:
        return told.stream(task, "check", lambda report: shown(service, expert, report))
    return shown(service, expert, await asyncio.shield(task))


@endpoints.get("/{name}/check")
async def show_check(name: str, service: ServiceDep, caller: InferCaller, version: Number = None) -> CheckReport:
    """The report of a version's latest check; for its owner and the operator."""
    expert = await version_of(service, name, version, caller)
    return shown(service, expert, await service.checks.report(expert))
