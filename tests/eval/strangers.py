"""What stands in for engines: one in this process, and a small HTTP server with OpenAI's paths."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from eval.asking import Ask, EngineGone, Likelihood, Reply


class InProcess:
    """Answers with who was asked: "who: prompt". `fails` says which asks have an error, `most` when it is gone."""

    def __init__(self, fails: Callable[[Ask], str | None] = lambda ask: None, most: int | None = None) -> None:
        self.id = "in process"
        self.asked: list[Ask] = []
        self.opened = 0
        self._fails, self._most = fails, most

    async def __aenter__(self) -> InProcess:
        self.opened += 1
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def answers(self, asks: Sequence[Ask]) -> AsyncIterator[tuple[Ask, Reply]]:
        for ask in asks:
            if self._most is not None and len(self.asked) >= self._most:
                raise EngineGone("it fell over")
            self.asked.append(ask)
            if (why := self._fails(ask)) is not None:
                yield ask, Reply(error=why)
                continue
            who = "+".join(ask.recipe.names) or ask.recipe.kind
            yield (
                ask,
                Reply(
                    texts=() if ask.choices else (f"{who}: {ask.prompt.text}",) * ask.n,
                    likelihoods=tuple(Likelihood(logprob=-len(choice), tokens=1) for choice in ask.choices),
                    prompt_tokens=len(ask.prompt.text.split()),
                    tokens=3,
                    seconds=0.25,
                    experts=(("maths", 1.0),) if ask.recipe.kind == "model" else None,
                    trace={
                        "id": f"dec-{len(self.asked)}",
                        "decision": {"id": "dec"},
                        "experts": list(ask.recipe.names),
                        "weights": [[1 / 3]],
                    }
                    if ask.traced
                    else None,
                ),
            )


class Stranger(ThreadingHTTPServer):
    """Counts letters as tokens: every letter is one, and its code is its id. Bodies that came are in `bodies`.

    refuse  of a body: (status, code, message) to answer with
    deaf    without vLLM's extensions
    dies    after so many answers every connection is closed without a word
    """

    daemon_threads = True
    request_queue_size = 256  # all of a test's connections at once

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.refuse: Callable[[dict[str, Any]], tuple[int, str, str] | None] = lambda body: None
        self.deaf = False
        self.dies: int | None = None
        self.answered = 0
        self.headers: dict[str, str] = {}
        self.models = ["base", "auto", "maths", "poetry"]
        self.digests: dict[str, str] = {}
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def dead(self) -> bool:
        with self.lock:
            self.answered += 1
            return self.dies is not None and self.answered > self.dies

    def asked(self, path: str) -> list[dict[str, Any]]:
        return [body for at, body in self.bodies if at == path]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Stranger

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name
        return

    def do_GET(self) -> None:
        if self.server.dead():
            self.close_connection = True
        elif self.path == "/v1/models":
            rows = [{"id": name, "object": "model"} for name in self.server.models]
            self.reply(200, {"object": "list", "data": rows})
        elif self.path == "/v1/experts" and self.server.digests:
            self.reply(200, {"data": [{"name": name, "digest": each} for name, each in self.server.digests.items()]})
        elif self.path == "/v1/traces/dec-1":
            self.reply(200, {"decision": "dec-1", "experts": ["maths"], "weights": [[1.0]]})
        else:
            self.reply(404, {"error": {"message": "no such path"}})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["content-length"]))
        if len(content) < int(self.headers["content-length"]):  # whoever asked has gone
            return
        body = json.loads(content)
        self.server.bodies.append((self.path, body))
        if self.server.dead():
            self.close_connection = True
            return
        if (refused := self.server.refuse(body)) is not None:
            status, code, message = refused
            self.reply(status, {"error": {"message": message, "code": code}})
        elif self.path == "/tokenize" and not self.server.deaf:
            text = body.get("prompt") or "".join(f"<{each['content']}>" for each in body.get("messages", ()))
            self.reply(200, {"tokens": [ord(letter) for letter in text]})
        elif self.path == "/v1/chat/completions":
            text = f"{body['model']}: {body['messages'][-1]['content']}"
            message = {"role": "assistant", "content": text}
            choices = [{"index": k, "message": message, "finish_reason": "stop"} for k in range(body.get("n") or 1)]
            self.complete("chat.completion", choices, body)
        elif self.path == "/v1/completions":
            self.complete("text_completion", list(self.choices(body)), body)
        else:
            self.reply(404, {"error": {"message": "no such path"}})

    def choices(self, body: dict[str, Any]) -> Any:
        """The log-probability of a letter is minus its code over 100; capitals are what greedy decoding says."""
        prompt = body["prompt"]
        for index, row in enumerate(prompt if isinstance(prompt, list) else [prompt]):
            choice = {"index": index, "text": f"{body['model']}: {row}", "finish_reason": "stop"}
            if body.get("prompt_logprobs") is not None and not self.server.deaf:
                steps = [{str(token): {"logprob": -token / 100, "rank": 1 if token < 97 else 2}} for token in row]
                choice["prompt_logprobs"] = [None, *steps[1:]]
            yield choice

    def complete(self, kind: str, choices: list[dict[str, Any]], body: dict[str, Any]) -> None:
        usage = {"prompt_tokens": 7, "completion_tokens": 5 * len(choices), "total_tokens": 12}
        told = {"id": "1", "object": kind, "created": 1, "model": body["model"], "choices": choices, "usage": usage}
        self.reply(200, told, self.server.headers)

    def reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
