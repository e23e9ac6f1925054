"""A server without vLLM: a real registry and router, and an engine that only says who would have answered."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import json
import os
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from safetensors import safe_open

from adapters_registry.base import BaseSpec
from adapters_registry.expert import Expert, Sample, State
from adapters_registry.lora import CONFIG, WEIGHTS
from adapters_registry.proposal import FolderSource, Proposal
from adapters_registry.registry import Registry
from router.encoder import Vectors
from router.gating.layout import KEY, Layout
from router.router import Router
from serving.app import create_app
from serving.config import Settings
from serving.engine import Adapter, AdapterLoadFailed, ASGIApp, EngineError, EngineUnavailable, Message, Trace
from serving.service import Service

#: What the experts of the library answer, by name; `auto` finds them by these words.
SAMPLES = {
    "count": ("how many letters has banana", "how many letters has window"),
    "reverse": ("spell banana backwards", "spell window backwards"),
    "shout": ("write banana loudly", "write window loudly"),
}
WAIT = 10.0


@dataclass
class Asked:
    path: str
    body: dict[str, Any]
    headers: dict[str, str]


class FakeEngine:
    """Answers `<who>: <the last thing said>`, word by word when streaming.

    refuses    shown names whose load fails
    inert      shown names that change no log-probability; broken: those that make it NaN
    gate       requests wait for it before they answer, and at every chunk of a stream
    dead       every request is a 500, health says so, until it is started again
    lost       names whose adapter went away under a request: must stay empty
    evidence   what a composite reads from any prompt, by expert's name; 0 for the others
    says       by the engine's name for somebody, or the shown one: what is answered to a prompt, in a chat
    shifts     by the shown name: by how many nats it changes log-probabilities; .25 unless told
    """

    base_model = "tiny"

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.shown: dict[str, str] = {}
        self.refuses: set[str] = set()
        self.inert: set[str] = set()
        self.broken: set[str] = set()
        self.gate = asyncio.Event()
        self.gate.set()
        self.dead = False
        self.starts = 0
        self.fails_to_start = 0
        self.running = False
        self.hangups = 0
        self.waiting = 0
        self.lost: list[str] = []
        self.evidence: dict[str, float] = {}
        self.says: dict[str, Callable[[str], str]] = {}
        self.shifts: dict[str, float] = {}
        self.paths: dict[str, Path] = {}
        self.traces: dict[str, Trace] = {}
        self.answer: tuple[int, dict[str, Any]] | None = None  # instead of the usual one

    @property
    def app(self) -> ASGIApp:
        if not self.running:
            raise EngineUnavailable("The engine is still starting; try again in a few seconds.")
        return self._app

    async def start(self) -> None:
        await asyncio.sleep(0)
        if self.fails_to_start:
            self.fails_to_start -= 1
            raise EngineError("no memory")
        self.starts += 1
        self.running, self.dead = True, False

    async def stop(self) -> None:
        self.running = False
        self.shown.clear()

    async def load(self, adapter: Adapter) -> None:
        await asyncio.sleep(0)
        if not self.running or self.dead:
            raise EngineUnavailable("The engine is down.")
        if adapter.shown in self.refuses or not await asyncio.to_thread(adapter.path.is_dir):
            raise AdapterLoadFailed(adapter.shown, "it is not for me")
        self.shown[adapter.name], self.paths[adapter.name] = adapter.shown, adapter.path

    async def unload(self, name: str) -> None:
        await asyncio.sleep(0)  # the worst that the protocol allows: it takes effect late
        self.shown.pop(name, None)

    def loaded(self) -> frozenset[str]:
        return frozenset(self.shown)

    async def trace(self, key: str) -> Trace | None:
        await asyncio.sleep(0)
        return self.traces.pop(key, None)

    def _traced(self, folder: Path, arguments: dict[str, Any]) -> Trace:
        """Weights as told, else equal ones, in two groups; three tokens that all have the same largest weight."""
        layout = layout_of(folder)
        K = len(layout.members)
        weights = np.array(arguments.get("moerge_weights") or [1 / K] * K)
        evidence = np.array([self.evidence.get(each.id.partition("@")[0], 0.0) for each in layout.members])
        moments: dict[str, Any] = {}
        if arguments.get("moerge_collect") == "moments":
            for module in modules_of(folder):
                moments[f"{module}.count"] = np.full(K, 3.0)
                moments[f"{module}.score"] = np.arange(1.0, K + 1) * 3
                moments[f"{module}.square"] = (np.arange(1.0, K + 1) ** 2 + 0.25) * 3
                moments[f"{module}.z"] = np.full(layout.rank, 6.0)
        top = np.full(3, weights.argmax())
        return Trace(("qkv_proj", "o_proj"), 3, np.stack([weights, weights]), top, evidence, moments)

    async def health(self) -> str | None:
        return None if self.running and not self.dead else "The engine stopped."

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        raw, more = b"", True
        while more:
            message = await receive()
            raw, more = raw + message["body"], message["more_body"]
        body = json.loads(raw)
        headers = {key.decode(): value.decode() for key, value in scope["headers"]}
        self.asked.append(Asked(scope["path"], body, headers))
        name = body.get("model")
        if name != self.base_model and name not in self.shown:
            await respond(send, 404, {"error": {"message": f"no model {name}"}})
            return
        if not body.get("stream") and not await self._open(receive):
            return
        who = self.shown.get(name, self.base_model)
        if (key := (body.get("vllm_xargs") or {}).get("moerge_trace")) is not None and self.answer is None:
            folder = self.paths[name]
            self.traces[key] = await asyncio.to_thread(self._traced, folder, body["vllm_xargs"])
        if self.dead:
            await respond(send, 500, {"error": {"message": "EngineDeadError"}})
        elif self.answer is not None:
            await respond(send, *self.answer)
        elif body.get("stream"):
            await self._stream(who, body, receive, send)
        else:
            await respond(send, 200, {"model": who, **self._content(scope["path"], who, body)})
        if name != self.base_model and name not in self.shown:
            self.lost.append(name)

    async def _open(self, receive: Any) -> bool:
        """Wait at the gate; False when the client hung up meanwhile."""
        if self.gate.is_set():
            return True
        self.waiting += 1
        opened, gone = asyncio.create_task(self.gate.wait()), asyncio.create_task(receive())
        await asyncio.wait({opened, gone}, return_when=asyncio.FIRST_COMPLETED)
        self.waiting -= 1
        left = gone.done()
        self.hangups += left
        for task in (opened, gone):
            task.cancel()
        return not left

    async def _stream(self, who: str, body: dict[str, Any], receive: Any, send: Any) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
            }
        )
        for word in (who, *said(body).split()):
            if not await self._open(receive):
                return
            chunk = {"object": "chat.completion.chunk", "model": who, "choices": [{"delta": {"content": f"{word} "}}]}
            await send({"type": "http.response.body", "body": event(json.dumps(chunk)), "more_body": True})
        await send({"type": "http.response.body", "body": event("[DONE]")})

    def _content(self, path: str, who: str, body: dict[str, Any]) -> dict[str, Any]:
        text = f"{who}: {said(body)}"
        shift = 0.0 if who in {self.base_model, *self.inert} else self.shifts.get(who, 0.25)
        shift = float("nan") if who in self.broken else shift
        top = [{"a": -0.5 - shift, "c": -2}, {"b": -1, "d": -3}]
        match path:
            case "/v1/chat/completions":
                if (says := self.says.get(body["model"], self.says.get(who))) is not None:
                    text = says(said(body))
                choice: dict[str, Any] = {"message": {"role": "assistant", "content": text}}
                if body.get("logprobs"):
                    listed = [[{"token": key, "logprob": value} for key, value in step.items()] for step in top]
                    choice["logprobs"] = {"content": [{**step[0], "top_logprobs": step} for step in listed]}
                return {"object": "chat.completion", "choices": [choice]}
            case "/v1/completions":
                logprobs = {"tokens": ["a", "b"], "top_logprobs": top}
                return {"object": "text_completion", "choices": [{"text": text, "logprobs": logprobs}]}
            case "/tokenize":
                return {"tokens": [1, 2, 3]}
            case "/detokenize":
                return {"prompt": "".join(map(chr, body.get("tokens", ())))}
            case _:
                return {"text": text}


def layout_of(folder: Path) -> Layout:
    return Layout.model_validate(json.loads((folder / CONFIG).read_bytes())[KEY])


def modules_of(folder: Path) -> list[str]:
    """`model.layers.0.self_attn.q_proj`, ..."""
    with safe_open(folder / WEIGHTS, "np") as tensors:
        names = [name.removeprefix("base_model.model.") for name in tensors.keys()]  # noqa: SIM118
    return sorted(name.removesuffix(".lora_A.weight") for name in names if ".lora_A." in name)


def said(body: dict[str, Any]) -> str:
    messages = body.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else {}
    return str(last.get("content") if isinstance(last, dict) else last) or str(
        body.get("prompt", body.get("input", ""))
    )


def event(data: str) -> bytes:
    return f"data: {data}\n\n".encode()


async def respond(send: Any, status: int, content: dict[str, Any]) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(content).encode()})


class WordsEncoder:
    """A text is the sum of random unit vectors, one to each of its words."""

    id = "words@1"
    dim = 64

    def encode(self, texts: Sequence[str]) -> Vectors:
        return np.stack([self._one(text) for text in texts]) if texts else np.zeros((0, self.dim), np.float32)

    def _one(self, text: str) -> Vectors:
        total = np.zeros(self.dim)
        for word in text.lower().split() or [""]:
            seed = int.from_bytes(hashlib.sha256(word.encode(errors="replace")).digest()[:8], "big")
            total += np.random.default_rng(seed).standard_normal(self.dim)
        return (total / np.linalg.norm(total)).astype(np.float32)


class Call:
    """One request driven by hand: messages are read as they are sent, and the client can hang up."""

    def __init__(
        self, app: ASGIApp, path: str, *parts: bytes, headers: dict[str, str] | None = None, query: bytes = b""
    ) -> None:
        self._parts = list(parts)
        self._gone = asyncio.Event()
        self._sent: asyncio.Queue[Message] = asyncio.Queue()
        given = {"host": "localhost", "content-type": "application/json", **(headers or {})}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query,
            "root_path": "",
            "scheme": "http",
            "client": ("127.0.0.1", 1),
            "server": ("localhost", 80),
            "headers": [(key.encode(), value.encode()) for key, value in given.items()],
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))  # type: ignore[arg-type]

    async def _receive(self) -> Message:
        if self._parts:
            part = self._parts.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self._parts)}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        await self._sent.put(message)

    def hang_up(self) -> None:
        self._gone.set()

    def pending(self) -> int:
        """Messages sent and not read yet."""
        return self._sent.qsize()

    async def next(self) -> Message:
        async with asyncio.timeout(WAIT):
            return await self._sent.get()

    async def done(self) -> None:
        async with asyncio.timeout(WAIT):
            await self.task


@dataclass
class World:
    """A running server, to be asked through `http`."""

    service: Service
    engine: FakeEngine
    registry: Registry
    app: FastAPI
    http: httpx.AsyncClient
    folder: Path
    fatal: list[Exception] = field(default_factory=list)

    async def ask(self, model: str | None, prompt: str, **more: Any) -> httpx.Response:
        headers = more.pop("headers", None)
        body = {"messages": [{"role": "user", "content": prompt}], **more}
        if model is not None:
            body["model"] = model
        return await self.http.post("/v1/chat/completions", json=body, headers=headers)

    def call(self, path: str, body: Any, *, content: bytes | None = None, **options: Any) -> Call:
        return Call(self.app, path, json.dumps(body).encode() if content is None else content, **options)

    def chat(self, model: str, prompt: str, **more: Any) -> Call:
        body = {"model": model, "messages": [{"role": "user", "content": prompt}], **more}
        return self.call("/v1/chat/completions", body)


async def until(condition: Callable[[], object], within: float = WAIT) -> None:
    async with asyncio.timeout(within):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.fixture(name="until")
def until_fixture() -> Callable[..., Any]:
    """`await until(condition)`: come back as soon as it is true."""
    return until


@pytest.fixture(scope="session", autouse=True)
def quick_garbage_collection() -> None:
    """PyTorch and its like are not looked through again each time that a test leaves cycles behind."""
    import hypothesis  # noqa: F401 (pytest imports it at the end, when it would miss what is frozen, and warn)

    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_outer_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [each for each in os.environ if each.startswith("MOERGE_") and not each.startswith("MOERGE_TEST_")]:
        monkeypatch.delenv(name)


def register(registry: Registry, name: str, folder: Path, state: State = State.ACTIVE, **details: Any) -> Expert:
    samples = tuple(Sample(prompt=each) for each in details.pop("samples", ()))
    proposal = Proposal(name=name, source=FolderSource(path=folder), samples=samples, **details)
    with registry.prepare(proposal) as prepared:
        return registry.commit(prepared, state=state)


@pytest.fixture(name="register", scope="session")
def register_fixture() -> Callable[..., Expert]:
    """`register(registry, name, folder, state=State.ACTIVE, samples=(), **Proposal's arguments)`, past the server."""
    return register


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory, base: BaseSpec, adapters: list[Path]) -> Path:
    """The data folder of a registry with three experts, to be copied; adapters[3] is in nobody's use."""
    folder = tmp_path_factory.mktemp("library") / "data"
    with Registry.open(folder, base=base) as registry:
        for (name, samples), adapter in zip(sorted(SAMPLES.items()), adapters, strict=False):
            register(registry, name, adapter, samples=samples, description=f"Can {name}.", licence="Apache-2.0")
    return folder


@pytest.fixture(scope="session")
def make_service(base: BaseSpec, adapters: list[Path]) -> Callable[..., Service]:
    """`make_service(folder, **settings)`: the parts of a server, put together and not started."""

    def make(folder: Path, **given: Any) -> Service:
        settings = settings_for(folder, adapters[0].parent, **given)
        registry = Registry.open(folder, base=base)
        return Service(
            settings, registry, Router(WordsEncoder(), settings.router, max_rank=settings.engine.max_rank), FakeEngine()
        )

    return make


Serve = Callable[..., AbstractAsyncContextManager[World]]


@pytest.fixture
def serve(tmp_path: Path, library: Path, make_service: Callable[..., Service]) -> Serve:
    """`async with serve(empty=False, wait=True, **settings) as world`: a server on a copy of the library."""

    @asynccontextmanager
    async def running(*, empty: bool = False, wait: bool = True, **given: Any) -> AsyncIterator[World]:
        folder = tmp_path / "data"
        if not folder.exists() and not empty:
            shutil.copytree(library, folder)
        service = make_service(folder, **given)
        app = create_app(service)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=WAIT) as http:
            assert isinstance(service.engine, FakeEngine)
            world = World(service, service.engine, service.registry, app, http, folder)
            if wait:
                service.start(nothing, world.fatal.append)
                await until(lambda: service.preparing is None)
            yield world
            await service.stop()

    return running


async def nothing() -> None:
    """There is nothing to warm up."""


def settings_for(folder: Path, imports: Path, **given: Any) -> Settings:
    engine = {"slots": 2, "resident": 4, **given.pop("engine", {})}
    registry = {"data_dir": folder, "import_dirs": [imports], **given.pop("registry", {})}
    return Settings.model_validate({"engine": engine, "registry": registry, "base_model": {"path": "tiny"}, **given})


@pytest.fixture
async def world(serve: Serve) -> AsyncIterator[World]:
    """A server with the experts count, reverse and shout."""
    async with serve() as running:
        yield running
        assert running.engine.lost == []


@pytest.fixture
def watchful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes are noticed at once, and nothing is kept for long."""
    monkeypatch.setattr("serving.service.WATCH", 0.01)
    monkeypatch.setattr("serving.service.GRACE", 0.0)
