"""`/v1/experts`: register, look up, change, promote, roll back, retire, remove."""

from __future__ import annotations

import asyncio
from datetime import datetime
from pathlib import Path
from tempfile import gettempdir
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.datastructures import FormData, UploadFile

from adapters_registry.expert import Check, Expert, Sample, State, Visibility
from adapters_registry.proposal import FolderSource, HubSource, Proposal, Source, UploadSource
from adapters_registry.store import refuse_when_full
from serving.auth import Caller
from serving.checks import policy
from serving.endpoints.common import AdminCaller, InferCaller, ServiceDep
from serving.endpoints.streams import Told
from serving.errors import BadRequest, Forbidden
from serving.registration import register
from serving.service import Service

endpoints = APIRouter(prefix="/v1/experts", tags=["experts"])

#: Parts of an upload beside the files, and the most of either.
MOST_FILES, MOST_FIELDS = 8, 8


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ExpertDescription(Strict):
    """What is said about an expert; what is left out comes from its model card."""

    name: str = Field(examples=["reverse"])
    description: str | None = None
    licence: str | None = None
    tags: list[str] | None = None
    training_data: list[str] | None = None
    samples: list[str | Sample] = Field(default_factory=list, description="Prompts it was made for, 10 to 20.")
    visibility: Visibility = "public"
    new_version: bool = Field(False, description="Add a version to a name that exists.")
    stage: bool = Field(False, description="Keep the version aside until it is promoted.")
    allow_base_mismatch: bool = Field(False, description="Accept an adapter that names another base model.")

    @field_validator("samples", mode="before")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if isinstance(value, list) and any(isinstance(each, str) and not each.strip() for each in value):
            raise ValueError("an empty sample says nothing; leave it out")
        return value

    def proposal(self, source: Source, caller: Caller) -> Proposal:
        return Proposal(
            name=self.name,
            source=source,
            description=self.description,
            licence=self.licence,
            tags=None if self.tags is None else tuple(self.tags),
            training_data=None if self.training_data is None else tuple(self.training_data),
            samples=tuple(Sample(prompt=each) if isinstance(each, str) else each for each in self.samples),
            owner=caller.tenant,
            visibility=self.visibility,
            new_version=self.new_version,
            allow_base_mismatch=self.allow_base_mismatch,
        )


class HubReference(Strict):
    hub: str = Field(examples=["lorahub/flan_t5_xl-wiki_qa"], description="Repository on the Hub.")
    revision: str | None = None
    subfolder: str | None = None


class FolderReference(Strict):
    folder: Path = Field(description="Folder on the server, inside one of registry.import_dirs.")


class NewExpert(ExpertDescription):
    source: HubReference | FolderReference


class ExpertChange(Strict):
    """Fields that are left out stay as they are."""

    description: str | None = None
    licence: str | None = None
    tags: list[str] | None = None
    training_data: list[str] | None = None
    samples: list[str | Sample] | None = None
    visibility: Visibility | None = None


class ExpertSummary(BaseModel):
    """One version of an expert, as clients see it."""

    object: Literal["expert"] = "expert"
    name: str
    version: int
    state: State
    digest: str
    base_model: str
    rank: int
    target_modules: list[str]
    source: str
    description: str
    licence: str | None
    tags: list[str]
    owner: str | None
    visibility: Visibility
    training_data: list[str]
    samples: int
    checks: list[Check]
    reasons: list[str]
    created_at: datetime
    loaded: bool


class ExpertDetail(ExpertSummary):
    sample_prompts: list[Sample]


class ExpertList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ExpertSummary]


def summary(service: Service, expert: Expert) -> ExpertSummary:
    fields = expert.model_dump(exclude={"path", "samples"})
    return ExpertSummary(**fields, samples=len(expert.samples), loaded=expert.id in service.engine.loaded())


def detail(service: Service, expert: Expert) -> ExpertDetail:
    return ExpertDetail(**summary(service, expert).model_dump(), sample_prompts=list(expert.samples))


@endpoints.post(
    "",
    status_code=201,
    response_model=ExpertSummary,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": NewExpert.model_json_schema(ref_template="#/components/schemas/{model}")
                },
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["expert", "files"],
                        "properties": {
                            "expert": {"type": "string", "description": "The description, as JSON."},
                            "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
                        },
                    }
                },
            },
        }
    },
)
async def add_expert(
    request: Request,
    service: ServiceDep,
    caller: AdminCaller,
    stream: Annotated[bool, Query(description="Report progress as server-sent events.")] = False,
) -> Any:
    """Register an expert from the Hub, from a folder of the server, or by upload (multipart).

    Answers when it is in service, or refuses with every reason. With `?stream=true`: events `progress`
    (`{"stage", "fraction"}`), then one `expert` or one `error`.
    """
    proposal, stage = await read_proposal(request, service, caller)

    def close(_: object) -> None:
        if isinstance(proposal.source, UploadSource):
            for file in proposal.source.files.values():
                file.close()

    # It goes on when the client leaves: it is whole or absent.
    told = Told()
    task = service.spawn(register(service, proposal, told.progress, stage=stage))
    task.add_done_callback(close)
    if stream:
        return told.stream(task, "expert", lambda expert: summary(service, expert))
    return summary(service, await asyncio.shield(task))


async def read_proposal(request: Request, service: Service, caller: Caller) -> tuple[Proposal, bool]:
    """The proposal in a JSON or multipart body. Raises BadRequest naming each field that is wrong."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    settings = service.settings
    try:
        if kind == "application/json":
            new = NewExpert.model_validate_json(await request.body())
            source = await asyncio.to_thread(source_of, new.source, settings.registry.import_dirs)
            return new.proposal(source, caller), new.stage
        if kind == "multipart/form-data":
            with refuse_when_full(Path(gettempdir())):  # where large uploads wait
                form = await request.form(max_files=MOST_FILES, max_fields=MOST_FIELDS, max_part_size=2**20)
            return await read_upload(form, caller)
    except ValidationError as error:
        raise BadRequest("; ".join(problem(each) for each in error.errors())) from error
    raise BadRequest(f"Send application/json or multipart/form-data, not '{kind or 'nothing'}'.")


async def read_upload(form: FormData, caller: Caller) -> tuple[Proposal, bool]:
    """The proposal in a form, with the form's files, which are closed if it is none."""
    try:
        parts = [part for part in form.getlist("files") if isinstance(part, UploadFile)]
        files = {part.filename or "": part.file for part in parts}
        described = form.get("expert")
        if unknown := form.keys() - {"expert", "files"}:
            raise BadRequest(f"Unknown parts of the upload: {', '.join(sorted(unknown))}. Send 'expert' and 'files'.")
        if len(files) < len(parts):
            raise BadRequest("Two of the files have the same name; upload one adapter at a time.")
        if not files or not isinstance(described, str):
            raise BadRequest("An upload has a part 'expert' (JSON) and parts 'files' (the adapter's files).")
        about = ExpertDescription.model_validate_json(described)
        return about.proposal(UploadSource(files=files), caller), about.stage
    except BaseException:
        await form.close()
        raise


def problem(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    return f"{where}: {error['msg']}" if where else str(error["msg"])


def source_of(reference: HubReference | FolderReference, import_dirs: tuple[Path, ...]) -> Source:
    """Where a client says the files are. Blocks. Raises Forbidden for a folder outside the import folders."""
    if isinstance(reference, HubReference):
        return HubSource(repo=reference.hub, revision=reference.revision, subfolder=reference.subfolder)
    try:
        folder = reference.folder.expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a NUL, a loop of links
        raise BadRequest(f"'{reference.folder}' is not a folder's path: {error}.", param="folder") from error
    if not any(folder.is_relative_to(root.resolve()) for root in import_dirs):
        raise Forbidden(
            "Folders of the server are open to clients only inside registry.import_dirs. Upload the files instead: "
            "`moerge expert add NAME ./folder` does."
        )
    return FolderSource(path=folder)


@endpoints.get("")
async def list_experts(
    service: ServiceDep,
    caller: InferCaller,
    state: Annotated[list[State] | None, Query(description="States to list; active ones when left out.")] = None,
) -> ExpertList:
    """The experts that the caller may use."""
    found = await asyncio.to_thread(service.registry.experts, caller.tenant, tuple(state or (State.ACTIVE,)))
    return ExpertList(data=[summary(service, expert) for expert in found])


@endpoints.get("/{name}")
async def show_expert(
    name: str, service: ServiceDep, caller: InferCaller, version: Annotated[int | None, Query(ge=1)] = None
) -> ExpertDetail:
    """One expert: its active version, or the one asked for."""
    return detail(service, await asyncio.to_thread(service.registry.get, name, version, caller.tenant))


@endpoints.get("/{name}/versions")
async def list_versions(name: str, service: ServiceDep, caller: InferCaller) -> ExpertList:
    """Every version of a name, oldest first."""
    found = await asyncio.to_thread(service.registry.versions, name, caller.tenant)
    return ExpertList(data=[summary(service, expert) for expert in found])


@endpoints.patch("/{name}")
async def change_expert(name: str, change: ExpertChange, service: ServiceDep, caller: AdminCaller) -> ExpertDetail:
    """Change what is said about the active version, or who may see the expert."""
    fields = change.model_dump(exclude_none=True, exclude={"samples"})
    if change.samples is not None:
        fields["samples"] = [Sample(prompt=each) if isinstance(each, str) else each for each in change.samples]
    try:
        expert = await asyncio.to_thread(service.registry.update, name, tenant=caller.tenant, **fields)
    except ValidationError as error:
        raise BadRequest("; ".join(problem(each) for each in error.errors())) from error
    await service.refresh()
    return detail(service, expert)


class Version(Strict):
    version: int = Field(ge=1)
    force: bool = Field(False, description="Also out of quarantine, and whatever its checks say.")


class Promoted(ExpertDetail):
    """`warnings` are what the checks of a staged version say against it."""

    warnings: list[str]


@endpoints.post("/{name}/promote")
async def promote_expert(name: str, target: Version, service: ServiceDep, caller: AdminCaller) -> Promoted:
    """Make a version the active one, if the policy for checks allows a staged one."""
    expert, against = await policy.promote(service, name, target.version, tenant=caller.tenant, force=target.force)
    await service.refresh()
    return Promoted(**detail(service, expert).model_dump(), warnings=list(against))


@endpoints.post("/{name}/rollback")
async def roll_back_expert(name: str, service: ServiceDep, caller: AdminCaller) -> ExpertDetail:
    """Return to the version that was active before."""
    expert = await asyncio.to_thread(service.registry.rollback, name, tenant=caller.tenant)
    await service.refresh()
    return detail(service, expert)


@endpoints.post("/{name}/retire")
async def retire_expert(name: str, service: ServiceDep, caller: AdminCaller) -> ExpertDetail:
    """Take the active version out of service; it can be promoted again."""
    expert = await asyncio.to_thread(service.registry.retire, name, tenant=caller.tenant)
    await service.refresh()
    return detail(service, expert)


@endpoints.delete("/{name}")
async def remove_expert(
    name: str, service: ServiceDep, caller: AdminCaller, version: Annotated[int | None, Query(ge=1)] = None
) -> JSONResponse:
    """Forget an expert, or one of its versions. Requests that it is answering now are finished."""
    await asyncio.to_thread(service.registry.remove, name, version, tenant=caller.tenant)
    await service.refresh()
    return JSONResponse({"object": "expert.deleted", "name": name, "version": version, "deleted": True})
