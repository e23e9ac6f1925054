"""From settings to a running server: everything is built here and passed inwards."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from threadpoolctl import threadpool_limits

from adapters_registry.base import BaseSpec
from adapters_registry.keys import ApiKeys
from adapters_registry.manifest import Manifest, read_manifest
from adapters_registry.proposal import Proposal
from adapters_registry.registry import Registry
from adapters_registry.validate import Limits
from router.encoder import load_encoder
from router.router import Router
from serving.app import create_app
from serving.config import BaseModelSettings, ConfigError, ServerSettings, Settings
from serving.engine.embedded import EmbeddedVllm
from serving.registration import sync_manifest
from serving.service import Service

logger = logging.getLogger("moerge")


@dataclass(frozen=True)
class Plan:
    """Settings with the manifest read and the base model settled."""

    settings: Settings
    base: BaseModelSettings
    proposals: tuple[Proposal, ...]

    @property
    def data_dir(self) -> Path:
        """One registry for each base model."""
        return data_dir(self.settings, self.base.served_name)

    @property
    def database_url(self) -> str | None:
        url = self.settings.registry.database_url
        return url.get_secret_value() if url else None

    def spec(self) -> BaseSpec:
        """What the registry knows of the base model: reads its configuration."""
        base = self.base
        return BaseSpec.from_pretrained(
            base.path, name=base.served_name, revision=base.revision, aliases=frozenset(base.aliases)
        )


def data_dir(settings: Settings, base: str) -> Path:
    return settings.registry.data_dir.expanduser() / re.sub(r"[^A-Za-z0-9._-]+", "-", base).strip("-.")


def make_plan(settings: Settings) -> Plan:
    """Check what can be checked without starting anything. Raises ConfigError, ManifestError."""
    manifest: Manifest | None = read_manifest(settings.manifest) if settings.manifest else None
    base = settings.base_model
    if base is None and manifest is not None:
        ref = manifest.base_model
        base = BaseModelSettings(path=ref.model, name=ref.name, revision=ref.revision, aliases=ref.aliases)
        wanted = {"max_model_len": ref.context, "dtype": ref.dtype}
        given = settings.engine.model_fields_set  # what the operator says counts more than the manifest
        changes = {key: value for key, value in wanted.items() if value is not None and key not in given}
        settings = settings.model_copy(update={"engine": settings.engine.model_copy(update=changes)})
    if base is None:
        raise ConfigError(
            "No base model: give base_model.path (or MOERGE_BASE_MODEL__PATH), or a manifest that names one "
            "(--manifest; `make serve` serves the quickstart's)."
        )
    return Plan(settings, base, manifest.proposals if manifest else ())


def check_keys(plan: Plan) -> None:
    """Off loopback there must be a key. Raises ConfigError saying how to make one."""
    if plan.settings.server.loopback:
        return
    keys = open_keys(plan.settings, plan.base.served_name)
    try:
        if any(key.revoked_at is None for key in keys.list()):
            return
    finally:
        keys.close()
    raise ConfigError(
        f"server.host is {plan.settings.server.host}, which others can reach, and there is no API key. "
        "Make one with `moerge keys create` (same configuration), or listen on 127.0.0.1."
    )


def open_keys(settings: Settings, base: str) -> ApiKeys:
    url = settings.registry.database_url
    return ApiKeys.open(data_dir(settings, base), url.get_secret_value() if url else None)


def build_service(plan: Plan) -> Service:
    """Open the registry, load the encoder and prepare the engine. Blocks; nothing listens yet."""
    settings, base, spec = plan.settings, plan.base, plan.spec()
    registry = Registry.open(
        plan.data_dir,
        url=plan.database_url,
        base=spec,
        limits=Limits(
            max_rank=settings.engine.max_rank,
            max_bytes=int(settings.registry.max_adapter_mb * 2**20),
            excluded_modules=frozenset(
                {m.rsplit(".", 1)[-1] for m in spec.modules} - {*settings.engine.target_modules}
            ),
        ),
    )
    wanted = settings.router
    encoder = load_encoder(wanted.encoder, backend=wanted.encoder_backend, threads=wanted.encoder_threads)
    router = Router(encoder, settings.router, max_rank=settings.engine.max_rank)
    engine = EmbeddedVllm(settings.engine, model=base.path, served_name=base.served_name, revision=base.revision)
    return Service(settings, registry, router, engine)


def quiet_blas() -> None:
    """One thread for NumPy's matrix products, which are small here.

    Its other threads would wait for the next product in a loop, on the cores that the engine computes on.
    """
    threadpool_limits(1, user_api="blas")


class Server(uvicorn.Server):
    """uvicorn, remembering why it had to stop."""

    failed: Exception | None = None

    def fail(self, error: Exception) -> None:
        self.failed = error
        self.should_exit = True


def listen(settings: ServerSettings) -> socket.socket:
    """The listening socket: taken before anything slow begins. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        raise ConfigError(f"Cannot listen on {where} (server.host, server.port): {error.strerror}.") from error


def serve(plan: Plan, on_ready: Callable[[Service], None], on_expert: Callable[[int, Proposal, str], None]) -> None:
    """Run until Ctrl-C or SIGTERM; requests in flight are finished first. Raises what the first start failed with."""
    with listen(plan.settings.server) as listener:
        service = build_service(plan)
        quiet_blas()
        app = create_app(service)

        @asynccontextmanager
        async def lifespan(_: FastAPI) -> AsyncIterator[None]:
            async def warm_up() -> None:
                await sync_manifest(service, plan.proposals, on_expert)
                on_ready(service)

            service.start(warm_up, server.fail)
            try:
                yield
            finally:
                await service.stop()

        app.router.lifespan_context = lifespan
        server = Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=30,
                timeout_keep_alive=75,
            )
        )
        asyncio.run(server.serve(sockets=[listener]))
    if server.failed is not None:
        raise server.failed
