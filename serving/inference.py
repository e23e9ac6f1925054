"""The way through the house: read the request once, decide who answers, hand it to the engine untouched.

A pure ASGI application on the OpenAI paths. Streaming, tools, structured output and logprobs are the engine's own;
only `model` is rewritten, and the decision is reported in `x-moerge-*` headers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders

from router.decision import Decision
from router.gating import GATES
from serving import metrics
from serving.auth import Caller
from serving.deciding import (
    FAILURES,
    NAMED,
    decide,
    fallen_back,
    is_routed,
    read_text,
    requested_model,
    turn_of,
)
from serving.engine import EngineUnavailable, Message, Receive, Scope, Send
from serving.errors import BadRequest, error_response
from serving.extension import Extension, take_extension
from serving.probing import probe
from serving.service import Service
from serving.tokens import in_words
from serving.traces import trace_of

logger = logging.getLogger("moerge.request")

#: Engine paths that clients may use. Whatever else vLLM's app offers stays inside.
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
#: Paths that never generate: `auto` means the base model there, and nothing is routed.
TOKEN_PATHS = ("/v1/messages/count_tokens", "/tokenize", "/detokenize")

#: Bodies larger than this are parsed in a thread (bytes).
PARSE_IN_THREAD = 256 * 1024
SCOPE_KEYS = (
    "type",
    "asgi",
    "http_version",
    "method",
    "path",
    "raw_path",
    "query_string",
    "scheme",
    "client",
    "server",
)


@dataclass
class Exchange:
    """One request on its way: what its log line and its headers will say."""

    path: str
    model: str = ""
    decision: Decision | None = None
    traced: bool = False
    trace: str | None = None  # the engine's key for a trace that is still to be fetched
    status: int = 0
    started: float = field(default_factory=time.perf_counter)

    def headers(self) -> dict[str, str]:
        if (decision := self.decision) is None:
            return {}
        traced = {"x-moerge-trace": f"/v1/traces/{decision.id}"} if self.traced and self.status == 200 else {}
        return traced | {
            "x-moerge-decision-id": decision.id,
            "x-moerge-method": decision.method,
            "x-moerge-experts": decision.summary,
            **({"x-moerge-operator": decision.operator} if decision.operator else {}),
            "x-moerge-confidence": f"{decision.confidence:.4f}",
            "x-moerge-route-ms": f"{decision.timings.get('total', 0.0):.2f}",
        }

    def record(self) -> None:
        """One log line and the metrics; never any of the prompt."""
        decision = self.decision
        policy = decision.method if decision else "none"
        kind = decision.kind if decision else "none"
        metrics.REQUESTS.labels(policy, kind, str(self.status)).inc()
        for each in decision.experts if decision else ():
            if each.weight:
                metrics.SELECTED.labels(each.expert).inc()
        logger.info(
            "%s %s model=%s method=%s kind=%s operator=%s experts=%s route_ms=%.2f total_ms=%.1f status=%d",
            decision.id if decision else "-",
            self.path,
            loggable(self.model),
            policy,
            kind,
            (decision.operator if decision else None) or "-",
            decision.summary if decision else "",
            decision.timings.get("total", 0.0) if decision else 0.0,
            (time.perf_counter() - self.started) * 1e3,
            self.status,
        )


def loggable(name: str) -> str:
    """A client's text as one word of a log line."""
    return re.sub(r"[^\w.:@/+-]", "?", name[:100], flags=re.ASCII) or "-"


class Inference:
    """ASGI application for the engine's paths."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        exchange = Exchange(scope["path"])
        answer = Answer(send, exchange, self._service)
        try:
            caller = await self._service.authenticator.caller(Headers(raw=scope["headers"]))
            caller.require("infer")
            raw = await read_body(receive)
            body = await parse(raw)
            async with self._answering(exchange, body, caller) as changed:
                raw = await rewritten(raw, body, changed)
                await self._service.engine.app(*forward(scope, receive, raw), answer)
        except Disconnected:
            pass  # the client left before it had sent its request
        except Exception as error:
            if answer.begun:
                raise  # too late for a status; the server closes the connection
            await answer.refuse(error)
        finally:
            if not answer.begun:
                exchange.status = 499  # nobody is left to answer
            exchange.record()

    @contextlib.asynccontextmanager
    async def _answering(
        self, exchange: Exchange, body: dict[str, Any], caller: Caller
    ) -> AsyncIterator[dict[str, Any]]:
        """Decide, and hold what answers in the engine for the block; gives the body as the engine should get it."""
        service = self._service
        exchange.model = model = requested_model(body)
        changed, extension = take_extension(body)
        if service.failure is not None:
            raise EngineUnavailable(service.failure)
        if exchange.path in TOKEN_PATHS and is_routed(model):
            model, extension = service.engine.base_model, Extension()
        words = await in_words(service, changed) if is_routed(model) else changed
        turn = await turn_of(service, model, words, caller, extension)
        settled = await decide(service, model, words, caller, extension=extension, turn=turn, live=True)
        exchange.decision = decision = service.groups.within(settled)
        async with contextlib.AsyncExitStack() as stack:
            try:
                if decision.verdict is not None:
                    keep = extension.trace
                    decision = await probe(service, exchange.path, changed, decision, trace=keep, tenant=caller.tenant)
                    exchange.decision = settled = decision
                name = await stack.enter_async_context(service.hold(decision))
                service.conversations.remember(turn, settled)
            except FAILURES as error:
                if decision.method == NAMED:
                    raise
                exchange.decision = decision = fallen_back(decision, error)
                name = service.engine.base_model
            if extension.trace and decision.kind == "gate":
                exchange.trace = decision.id
                stack.enter_context(service.traces.expected(decision.id))
            if decision.method != NAMED:
                service.feedback.record(decision, read_text(service, words), caller.tenant)
            exchange.traced = exchange.trace is not None or decision.id in service.traces
            yield with_arguments({**changed, "model": name}, arguments(decision, exchange.trace))
            if exchange.trace is not None and (found := await service.engine.trace(exchange.trace)) is not None:
                service.traces.put(caller.tenant, trace_of(exchange.model, decision, decision, found))


def arguments(decision: Decision, trace: str | None) -> dict[str, Any]:
    """What the engine's gates are told of one request: weights that somebody chose, and whether to keep a trace."""
    told: dict[str, Any] = {} if trace is None else {"moerge_trace": trace, "moerge_collect": "gates"}
    weights = [each.weight for each in decision.experts]
    if decision.gate is not None and GATES[decision.gate].takes_weights and not equal(weights):
        told["moerge_weights"] = weights
    return told


def equal(weights: list[float]) -> bool:
    """1/K each, which gates assume without being told, so that such requests share their prefix cache."""
    return all(abs(weight * len(weights) - 1) < 1e-9 for weight in weights)


def with_arguments(body: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    """The body with these among its `vllm_xargs`."""
    return {**body, "vllm_xargs": {**(body.get("vllm_xargs") or {}), **told}} if told else body


class Disconnected(Exception):
    """The client hung up while it was still sending."""


async def read_body(receive: Receive) -> bytes:
    """The whole request body, which the gate keeps within limits. Raises Disconnected."""
    parts: list[bytes] = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def parse(raw: bytes) -> dict[str, Any]:
    """The body as a JSON object. Raises BadRequest."""
    try:
        body = json.loads(raw) if len(raw) < PARSE_IN_THREAD else await asyncio.to_thread(json.loads, raw)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"The request body is not JSON: {error}.") from error
    if not isinstance(body, dict):
        raise BadRequest(f"The request body must be a JSON object, not {type(body).__name__}.")
    return body


async def rewritten(raw: bytes, body: dict[str, Any], changed: dict[str, Any]) -> bytes:
    """The request as the engine should get it; its own bytes when nothing is changed. Raises BadRequest."""
    if changed == body:
        return raw
    try:
        text = json.dumps(changed) if len(raw) < PARSE_IN_THREAD else await asyncio.to_thread(json.dumps, changed)
    except RecursionError as error:  # reading goes a little deeper than writing
        raise BadRequest("The request body is nested too deeply.") from error
    return text.encode()


def forward(scope: Scope, receive: Receive, raw: bytes) -> tuple[Scope, Receive]:
    """Scope and receive for the engine's app: the client's own, with this body and without its key."""
    inner = {key: scope[key] for key in SCOPE_KEYS if key in scope}
    dropped = (b"content-length", b"transfer-encoding", b"authorization", b"x-api-key")
    inner["headers"] = [(k, v) for k, v in scope["headers"] if k not in dropped]
    inner["headers"].append((b"content-length", str(len(raw)).encode()))
    inner["root_path"] = ""
    first = True

    async def replay() -> Message:
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": raw, "more_body": False}
        return await receive()  # the client's hang-up, which stops the engine's work

    return inner, replay


class Answer:
    """The engine's `send`: adds our headers, and turns the 500s of a dead engine into one clear 503."""

    def __init__(self, send: Send, exchange: Exchange, service: Service) -> None:
        self._send = send
        self._exchange = exchange
        self._service = service
        self._replaced = False
        self.begun = False

    async def __call__(self, message: Message) -> None:
        if self._replaced:
            return
        if message["type"] == "http.response.start":
            if message["status"] >= 500 and (down := await self._down()) is not None:
                self._replaced = True
                await self.refuse(down)
                return
            await self._start(message["status"], list(message.get("headers", ())))
        else:
            await self._send(message)

    async def refuse(self, error: Exception) -> None:
        """Answer with an error instead."""
        response = error_response(error)
        if response.status_code == 500 and (down := await self._down()) is not None:
            response = error_response(down)
        elif response.status_code == 500:
            logger.error("%s failed", self._exchange.path, exc_info=error)
        await self._start(response.status_code, response.raw_headers)
        await self._send({"type": "http.response.body", "body": bytes(response.body)})

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.begun = True
        self._exchange.status = status
        MutableHeaders(raw=headers).update(self._exchange.headers())
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _down(self) -> EngineUnavailable | None:
        if await self._service.engine.health() is None:
            return None
        return EngineUnavailable("The engine stopped and is being restarted; try again.")
