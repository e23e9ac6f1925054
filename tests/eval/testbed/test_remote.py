"""The client side of `moerge testbed check --endpoint`, against a server of a few lines."""

from __future__ import annotations

import json
from collections.abc import Callable

import httpx
import pytest
from openai import APIStatusError, AsyncOpenAI

from eval.testbed import remote

TESTS = {
    "reverse": [{"prompt": "Spell cat backwards", "answer": "tac"}, {"prompt": "Reverse dog", "answer": "god"}],
    "transform-digits": [{"prompt": "Transform 312", "answer": "123"}],
}
TOLD = {"reverse": "instruction", "transform-digits": "input"}
OOD = ["Hello", "Who are you?"]

Answer = Callable[[str], tuple[str, str]]  # prompt -> text, header


def _client(answer: Answer, seen: list[dict[str, object]] | None = None) -> AsyncOpenAI:
    def handle(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if seen is not None:
            seen.append(body)
        text, header = answer(body["messages"][-1]["content"])
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        content = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        return httpx.Response(200, json=content, headers={"x-moerge-experts": header})

    transport = httpx.MockTransport(handle)
    return AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=httpx.AsyncClient(transport=transport))


def _perfect(prompt: str) -> tuple[str, str]:
    for name, records in TESTS.items():
        for record in records:
            if record["prompt"] == prompt:
                return f" {record['answer']}\n", f"{name}=1.0"
    return "I do not know.", ""


async def test_a_server_that_is_always_right_scores_one() -> None:
    seen: list[dict[str, object]] = []
    report = await remote.measure(_client(_perfect, seen), TESTS, TOLD, OOD, concurrency=2)
    assert report.told["instruction"] == remote.Share(prompts=2, routed=1.0, exact=1.0)
    assert report.told["input"] == remote.Share(prompts=1, routed=1.0, exact=1.0)
    assert report.ood_to_base == 1.0
    assert report.failures() == []
    assert {body["model"] for body in seen} == {"auto"}
    assert len(seen) == 5


async def test_routing_and_answers_are_counted_apart_and_the_heaviest_expert_counts() -> None:
    def answer(prompt: str) -> tuple[str, str]:
        if prompt == "Reverse dog":
            return "god", "reverse=0.3,transform-digits=0.7"
        return "wrong", "transform-digits=0.2,reverse=0.8"

    report = await remote.measure(_client(answer), TESTS, TOLD, OOD)
    assert report.experts["reverse"] == remote.Share(prompts=2, routed=0.5, exact=0.5)
    assert report.told["input"] == remote.Share(prompts=1, routed=0.0, exact=0.0)
    assert report.ood_to_base == 0.0
    assert len(report.failures()) == 2


async def test_progress_is_told_of_every_reply() -> None:
    done = []
    await remote.measure(_client(_perfect), TESTS, TOLD, OOD, advance=lambda: done.append(1))
    assert len(done) == 5


async def test_a_refusal_of_the_server_reaches_the_caller() -> None:
    transport = httpx.MockTransport(lambda _: httpx.Response(401, json={"error": {"message": "no key"}}))
    client = AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=httpx.AsyncClient(transport=transport))
    with pytest.RaisesGroup(APIStatusError):
        await remote.measure(client, {}, {}, ["Hello"])


@pytest.mark.parametrize(
    ("header", "pairs"),
    [
        ("", ()),
        ("reverse=1", (("reverse", 1.0),)),
        ("a=0.25, b=0.75", (("b", 0.75), ("a", 0.25))),
    ],
)
def test_the_experts_header_is_read_heaviest_first(header: str, pairs: tuple[tuple[str, float], ...]) -> None:
    assert remote.parse_experts(header) == pairs
