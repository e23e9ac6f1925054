"""`POST /v1/gates/calibrate`: measure experts' scores on neutral prompts, for gates that use z-scores."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from adapters_registry.errors import ExpertNotFound
from router.composite import CompositeError
from serving.endpoints.common import AdminCaller, ServiceDep
from serving.errors import Forbidden
from serving.recipes import needed_tensors

endpoints = APIRouter(prefix="/v1/gates", tags=["gates"])


class CalibrationRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    gate: str = Field("evidence", description="A gate that uses z-scores.")
    settings: dict[str, Any] = Field(default_factory=dict, description="The gate's settings.")
    experts: list[str] | None = Field(None, description="Experts to measure; all active ones when left out.")
    prompts: list[str] | None = Field(
        None, description="Neutral prompts; the other experts' samples when left out.", min_length=1, max_length=1000
    )
    again: bool = Field(False, description="Also experts that were measured before.")


class CalibrationResult(BaseModel):
    """`key` is what the statistics are stored under; `measured` are the experts whose scores are new."""

    object: Literal["calibration"] = "calibration"
    key: str
    measured: list[str]


@endpoints.post("/calibrate")
async def calibrate(body: CalibrationRequest, service: ServiceDep, caller: AdminCaller) -> CalibrationResult:
    """Done by itself when a gate first needs it; this does it beforehand, again, or with other prompts."""
    if caller.tenant is not None:
        raise Forbidden("Calibration reads the samples of all tenants; it needs a key of the owner 'operator'.")
    active = {expert.name: expert for expert in service.experts(None)}
    for name in body.experts or ():
        if name not in active:
            raise ExpertNotFound(name, known=sorted(active))
    experts = [active[name] for name in body.experts or sorted(active)]
    keys = [key for key in needed_tensors(body.gate, body.settings, 2) if key.startswith("statistics/")]
    if not keys:
        raise CompositeError([f"Gate '{body.gate}' with these settings uses no statistics: nothing to calibrate."])
    prompts = sorted(set(body.prompts)) if body.prompts else None
    work = service.calibration.measure(experts, keys[0], prompts=prompts, again=body.again or prompts is not None)
    measured = await asyncio.shield(service.spawn(work))  # it goes on when its client leaves
    return CalibrationResult(key=keys[0], measured=measured)
