"""For whoever runs the server: `/health`, `/ready`, `/metrics`."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from serving.endpoints.common import AdminCaller, ServiceDep
from serving.errors import Forbidden

endpoints = APIRouter(tags=["operations"])


@endpoints.get("/health")
async def health() -> dict[str, str]:
    """200 while the process answers at all."""
    return {"status": "ok"}


@endpoints.get("/ready")
async def ready(service: ServiceDep) -> JSONResponse:
    """200 when requests are answered, else 503 with the reason."""
    if reason := service.failure or service.preparing:
        return JSONResponse({"status": "not ready", "reason": reason}, status_code=503, headers={"retry-after": "5"})
    state = {"status": "ready", "experts": len(service.experts(None)), "generation": service.generation}
    return JSONResponse({**state, "router": service.router.learned.number, "problems": list(service.problems)})


@endpoints.get("/metrics", response_class=Response)
def metrics(caller: AdminCaller) -> Response:
    """Prometheus: vLLM's metrics and `moerge_*`. They name everybody's private experts: for the operator only."""
    if caller.tenant is not None:
        raise Forbidden("Metrics name the experts of all tenants; they need a key of the owner 'operator'.")
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
