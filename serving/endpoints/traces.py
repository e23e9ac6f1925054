"""`GET /v1/traces/{id}`: which experts each layer and token of a request used."""

from __future__ import annotations

from fastapi import APIRouter

from serving.endpoints.common import InferCaller, ServiceDep
from serving.errors import TraceNotFound
from serving.traces import Trace

endpoints = APIRouter(prefix="/v1/traces", tags=["routing"])


@endpoints.get("/{decision_id}")
async def show_trace(decision_id: str, service: ServiceDep, caller: InferCaller) -> Trace:
    """The trace of a request that was sent with `moerge: {"trace": true}`, for whoever sent it."""
    trace = await service.traces.wait(decision_id, caller.tenant)
    if trace is None:
        raise TraceNotFound(decision_id)
    return trace
