"""vLLM inside this process: its own OpenAI app, with the engine core in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import logging
import os
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from serving.engine import Adapter, AdapterLoadFailed, ASGIApp, EngineError, EngineUnavailable, Trace, private
from serving.engine.transport import unpack

if TYPE_CHECKING:
    from serving.config import EngineSettings

logger = logging.getLogger("moerge.engine")


class EmbeddedVllm:
    """The default engine. One instance is one vLLM; `start` after `stop` builds a fresh one.

    Adapters are always loaded here before a request names them: a rank that vLLM meets lazily, inside a
    step, ends its engine. A name is never reused for other content, so its prefix cache stays right.
    """

    def __init__(self, settings: EngineSettings, *, model: str, served_name: str, revision: str | None = None) -> None:
        self.base_model = served_name
        self._argv = vllm_arguments(settings, model=model, served_name=served_name, revision=revision)
        self._app: ASGIApp | None = None
        self._client: Any = None
        self._models: Any = None
        self._shown: dict[str, str] = {}
        self._loading: dict[str, asyncio.Lock] = {}
        self._stack = contextlib.AsyncExitStack()

    @property
    def app(self) -> ASGIApp:
        if self._app is None:
            raise EngineUnavailable("The engine is still starting; try again in a few seconds.")
        return self._app

    async def start(self) -> None:
        # The workers start by `spawn`: this process has threads (torch, faiss) that do not survive a fork.
        for key, value in ENVIRONMENT.items():
            os.environ.setdefault(key, value)
        await asyncio.to_thread(importlib.import_module, "vllm.v1.engine.async_llm")
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
        from vllm.usage.usage_lib import UsageContext
        from vllm.utils.argparse_utils import FlexibleArgumentParser
        from vllm.v1.engine.async_llm import AsyncLLM

        try:
            args = make_arg_parser(FlexibleArgumentParser()).parse_args(self._argv)
            validate_parsed_serve_args(args)
        except SystemExit as error:  # argparse has printed what is wrong
            raise EngineError(f"vLLM does not accept these arguments: {' '.join(self._argv)}") from error

        def build() -> AsyncLLM:  # blocks until the engine core answers, so never on the event loop
            config = AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)
            return AsyncLLM.from_vllm_config(config, usage_context=UsageContext.OPENAI_API_SERVER)

        client = await asyncio.to_thread(build)
        self._stack.push_async_callback(asyncio.to_thread, client.shutdown, timeout=10)
        tasks = await client.get_supported_tasks()
        app = build_app(args, tasks, client.model_config)
        await init_app_state(client, app.state, args, tasks)
        # vLLM's error handlers ask its server to exit when the engine dies; the supervisor watches health().
        app.state.server = SimpleNamespace(should_exit=False)
        self._client, self._models = client, app.state.openai_serving_models
        private.show_as(self._models, self._shown)
        self._app = app

    async def stop(self) -> None:
        self._app = self._client = self._models = None
        self._shown.clear()
        await self._stack.aclose()

    async def load(self, adapter: Adapter) -> None:
        async with self._loading.setdefault(adapter.name, asyncio.Lock()):
            models = self._models
            if models is None:
                raise EngineUnavailable("The engine is still starting; try again in a few seconds.")
            if adapter.name in models.lora_requests:
                return
            from vllm.lora.request import LoRARequest

            request = LoRARequest(
                lora_name=adapter.name,
                lora_int_id=models.lora_id_counter.inc(1),
                lora_path=str(adapter.path),
                base_model_name=self.base_model,
            )
            try:
                await self._client.add_lora(request)
            except Exception as error:
                await self._forget(request.lora_int_id)
                if self._client is None or self._client.errored:
                    raise EngineUnavailable("The engine stopped while it loaded an expert.") from error
                raise AdapterLoadFailed(adapter.shown, str(error)) from error
            self._shown[adapter.name] = adapter.shown
            models.lora_requests[adapter.name] = request

    async def unload(self, name: str) -> None:
        if self._models is not None and (request := self._models.lora_requests.pop(name, None)) is not None:
            self._shown.pop(name, None)
            self._loading.pop(name, None)
            await self._forget(request.lora_int_id)

    async def _forget(self, lora_id: int) -> None:
        # After a failed load vLLM may keep half an adapter under its id, so it is removed as well.
        with contextlib.suppress(Exception):
            await self._client.remove_lora(lora_id)

    async def trace(self, key: str) -> Trace | None:
        if self._client is None:
            raise EngineUnavailable("The engine is still starting; try again in a few seconds.")
        try:
            found = await self._client.collective_rpc(private.TRACE_METHOD, args=(key,))
        except Exception as error:
            raise EngineUnavailable("The engine stopped while it was asked for a trace.") from error
        return unpack(*found[0]) if found[0] is not None else None

    def loaded(self) -> frozenset[str]:
        return frozenset(self._models.lora_requests) if self._models is not None else frozenset()

    async def health(self) -> str | None:
        if self._client is None:
            return "The engine is still starting."
        try:
            await self._client.check_health()
        except Exception as error:  # EngineDeadError and whatever killed it
            return f"The engine stopped: {error}"
        return None


ENVIRONMENT = {
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def vllm_arguments(settings: EngineSettings, *, model: str, served_name: str, revision: str | None) -> list[str]:
    """`vllm serve`'s arguments for our settings; `settings.vllm` is passed on under vLLM's own names."""
    options: dict[str, Any] = {
        "model": model,
        "served_model_name": served_name,
        "revision": revision,
        "dtype": settings.dtype,
        "enable_lora": True,
        "max_loras": settings.slots,
        "max_cpu_loras": settings.resident,
        "max_lora_rank": settings.max_rank,
        "lora_target_modules": list(settings.target_modules),
        "max_model_len": settings.max_model_len,
        "enforce_eager": settings.enforce_eager,
        **settings.vllm,
    }
    argv: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        match value:
            case None | False:
                continue
            case True:
                argv.append(flag)
            case list():
                argv += [flag, *map(str, value)] if value else []
            case dict():
                argv += [flag, json.dumps(value)]
            case _:
                argv += [flag, str(value)]
    return argv
