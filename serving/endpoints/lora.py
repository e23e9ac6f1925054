"""vLLM's `/v1/load_lora_adapter` and `/v1/unload_lora_adapter`, going through the registry."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, ValidationError

from adapters_registry.errors import ExpertNotFound, ExpertRefused, Reason
from adapters_registry.expert import Expert, State
from adapters_registry.proposal import Proposal
from serving.auth import Caller
from serving.checks import policy
from serving.endpoints.common import AdminCaller, ServiceDep
from serving.endpoints.experts import FolderReference, HubReference, problem, source_of
from serving.errors import BadRequest
from serving.registration import register, same_content
from serving.service import Service

endpoints = APIRouter(tags=["vLLM compatibility"])


class LoadRequest(BaseModel):
    model_config = ConfigDict(extra="ignore")  # vLLM's clients send fields that mean nothing here

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadRequest(BaseModel):
    model_config = ConfigDict(extra="ignore")

    lora_name: str


@endpoints.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
async def load_lora_adapter(body: LoadRequest, service: ServiceDep, caller: AdminCaller) -> PlainTextResponse:
    """Register an adapter from a folder inside registry.import_dirs, or from a Hub repository.

    As in vLLM a name that is loaded is refused unless `load_inplace`, which adds a version. What was unloaded
    before is taken up again: the version with the same content.
    """
    if service.active(body.lora_name) is not None and not body.load_inplace:
        raise BadRequest(
            f"The lora adapter '{body.lora_name}' has already been loaded. To load the adapter in place, "
            "set 'load_inplace' to True."
        )
    try:
        proposal = await asyncio.to_thread(proposed, body, caller, service.settings.registry.import_dirs)
    except ValidationError as error:
        raise BadRequest("; ".join(problem(each) for each in error.errors())) from error
    expert = await asyncio.shield(service.spawn(put_in_service(service, proposal)))
    if expert.state is not State.ACTIVE:
        raise ExpertRefused(expert.name, [Reason(str(expert.state), reason) for reason in expert.reasons])
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


def proposed(body: LoadRequest, caller: Caller, import_dirs: tuple[Path, ...]) -> Proposal:
    path = body.lora_path
    local = path.startswith(("/", ".", "~")) or path.count("/") != 1
    reference = FolderReference(folder=Path(path)) if local else HubReference(hub=path)
    source = source_of(reference, import_dirs)
    return Proposal(name=body.lora_name, source=source, owner=caller.tenant, new_version=True)


async def put_in_service(service: Service, proposal: Proposal) -> Expert:
    """Register it, or promote the version of the name that has its content already."""
    try:
        return await register(service, proposal, lambda stage, fraction: None)
    except ExpertRefused as error:
        if (same := same_content(error)) is None:
            raise
    expert, _ = await policy.promote(service, proposal.name, same.version, tenant=proposal.owner, force=False)
    await service.refresh()
    return expert


@endpoints.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
async def unload_lora_adapter(body: UnloadRequest, service: ServiceDep, caller: AdminCaller) -> PlainTextResponse:
    """Take an expert out of service. Its version stays in the registry, and can be promoted again."""
    if not service.knows(body.lora_name, caller.tenant) or body.lora_name == service.engine.base_model:
        raise ExpertNotFound(body.lora_name, known=[expert.name for expert in service.experts(caller.tenant)])
    await asyncio.to_thread(service.registry.retire, body.lora_name, tenant=caller.tenant)
    await service.refresh()
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")
