"""The main path against the real vLLM, with the official clients."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

BANANA = [{"role": "user", "content": "Spell banana backwards"}]
IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/none.png"}}
OTHERS = ["/invocations", "/v1/chat/completions/batch", "/inference/v1/generate", "/scale_elastic_ep"]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 40}


def expert_of(response: Any) -> str:
    return str(response.headers["x-moerge-experts"].partition("=")[0])


def ask(server: Any, model: str, prompt: str) -> tuple[str, str]:
    """(what answered, the answer)"""
    response = server.openai.chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt}], **GREEDY
    )
    return response.model, response.choices[0].message.content.strip()


async def ask_all(server: Any, pairs: list[tuple[str, str]], width: int) -> list[tuple[str, str]]:
    """(what answered, the answer) for each (model, prompt), `width` in flight."""
    gate = asyncio.Semaphore(width)
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

        async def one(model: str, prompt: str) -> tuple[str, str]:
            async with gate:
                response = await client.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": prompt}], **GREEDY
                )
            return response.model, (response.choices[0].message.content or "").strip()

        return list(await asyncio.gather(*(one(*pair) for pair in pairs)))


def test_the_readme_s_question_is_answered_by_the_right_expert(server):
    response = server.http.post(
        "/v1/chat/completions",
        content='{"model":"auto","messages":[{"role":"user","content":"Spell banana backwards"}]}',
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"].strip() == "ananab"
    assert response.json()["model"] == "reverse"
    assert response.headers["x-moerge-experts"] == "reverse=1"
    assert response.headers["x-moerge-method"] == "fusion"
    assert response.headers["x-moerge-decision-id"].startswith("dec-")
    assert 0 < float(response.headers["x-moerge-confidence"]) <= 1
    assert float(response.headers["x-moerge-route-ms"]) > 0


def test_streaming_names_the_expert_in_headers_and_in_every_chunk(server):
    raw = server.openai.chat.completions.with_raw_response.create(model="auto", messages=BANANA, stream=True, **GREEDY)
    assert expert_of(raw) == "reverse"
    chunks = list(raw.parse())
    assert {chunk.model for chunk in chunks} == {"reverse"}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices).strip() == "ananab"


def test_models_lists_what_can_be_asked_for(server, testbed):
    models = {model.id: model for model in server.openai.models.list()}
    assert set(models) >= {"auto", "auto:retrieval", "quickstart", *testbed.tests}
    assert models["reverse"].parent == "quickstart"
    assert server.openai.models.retrieve("reverse").id == "reverse"


def test_an_unknown_model_is_openai_s_404(server):
    with pytest.raises(openai.NotFoundError) as caught:
        ask(server, "gpt-9", "hello")
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


def test_the_base_model_and_experts_can_be_named(server, testbed):
    test = testbed.tests["reverse"][0]
    assert ask(server, "reverse", test["prompt"]) == ("reverse", test["answer"])
    model, answer = ask(server, "quickstart", test["prompt"])
    assert model == "quickstart"
    assert answer != test["answer"]


def test_completions_are_routed(server):
    response = server.openai.completions.with_raw_response.create(
        model="auto", prompt="Spell banana backwards", max_tokens=5, logprobs=3
    )
    assert expert_of(response) == "reverse"
    parsed = response.parse()
    assert parsed.model == "reverse"
    assert len(parsed.choices[0].logprobs.token_logprobs) >= 1


def test_responses_are_routed(server):
    response = server.openai.responses.create(
        model="auto", input="Spell banana backwards", temperature=0, max_output_tokens=40
    )
    assert response.model == "reverse"
    assert response.output_text.strip() == "ananab"


def test_messages_are_routed_with_anthropic_s_client(server):
    client = anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)
    message = client.messages.create(model="auto", messages=BANANA, max_tokens=40, extra_body={"temperature": 0})
    assert message.model == "reverse"
    assert message.content[0].text.strip() == "ananab"


def test_structured_output_is_the_engine_s_own(server):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    response = server.openai.chat.completions.create(
        model="auto",
        messages=BANANA,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}},
        **GREEDY,
    )
    assert json.loads(response.choices[0].message.content)["n"] in (1, 2)


def test_a_tool_that_is_asked_for_is_called(server):
    parameters = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    tool = {"type": "function", "function": {"name": "pick", "parameters": parameters}}
    response = server.openai.chat.completions.create(
        model="reverse",
        messages=BANANA,
        tools=[tool],
        tool_choice={"type": "function", "function": {"name": "pick"}},
        **{**GREEDY, "max_tokens": 200},
    )
    call = response.choices[0].message.tool_calls[0].function
    assert call.name == "pick"
    json.loads(call.arguments)  # what stands in it is between vLLM's parser and the model


def test_logprobs_are_the_engine_s_own(server):
    response = server.openai.chat.completions.create(
        model="auto", messages=BANANA, logprobs=True, top_logprobs=2, **GREEDY
    )
    content = response.choices[0].logprobs.content
    assert "".join(each.token for each in content).strip().startswith("ananab")
    assert all(len(each.top_logprobs) == 2 for each in content)


def test_64_requests_at_once_are_all_answered_by_their_expert(server, testbed):
    asked = [(name, test) for name in ("reverse", "plural", "roman", "iso-date") for test in testbed.tests[name][:16]]
    answers = asyncio.run(ask_all(server, [("auto", test["prompt"]) for _, test in asked], 64))
    assert sum(model == name for (name, _), (model, _) in zip(asked, answers, strict=True)) >= 62
    assert sum(answer == test["answer"] for (_, test), (_, answer) in zip(asked, answers, strict=True)) >= 60


def test_16_experts_on_4_slots_answer_under_mixed_traffic_as_they_do_alone(server, testbed):
    """Base-model requests among them: stock vLLM on a CPU answers those with the last slot's adapter."""
    pairs = [(name, test["prompt"]) for name, tests in testbed.tests.items() for test in tests[:6]]
    pairs += [("quickstart", test["prompt"]) for tests in testbed.tests.values() for test in tests[:3]]
    alone = [ask(server, *pair) for pair in pairs[::4]]
    order = list(range(len(pairs)))
    random.Random(1).shuffle(order)
    together = asyncio.run(ask_all(server, [pairs[i] for i in order], 48))
    by_pair = {pairs[i]: answer for i, answer in zip(order, together, strict=True)}
    assert {pair: by_pair[pair] for pair in pairs[::4]} == dict(zip(pairs[::4], alone, strict=True))
    assert all(by_pair[pair][0] == pair[0] for pair in pairs)
    own = {test["prompt"]: test["answer"] for tests in testbed.tests.values() for test in tests}
    right = [by_pair[pair][1] == own[pair[1]] for pair in pairs if pair[0] != "quickstart"]
    assert sum(right) >= 0.93 * len(right)


def test_auto_routes_instruction_told_prompts_and_answers_them(server, testbed):
    """The testbed's target: 95 % of the prompts to their own expert, 90 % of the answers exactly right."""
    asked = [(name, test) for name in sorted(testbed.instruction_told) for test in testbed.tests[name]]
    answers = asyncio.run(ask_all(server, [("auto", test["prompt"]) for _, test in asked], 32))
    routed = sum(model == name for (name, _), (model, _) in zip(asked, answers, strict=True)) / len(asked)
    right = sum(answer == test["answer"] for (_, test), (_, answer) in zip(asked, answers, strict=True)) / len(asked)
    assert routed >= 0.95
    assert right >= 0.90


def test_a_client_that_hangs_up_stops_the_engine_s_work(server):
    stream = server.openai.chat.completions.create(
        model="quickstart", messages=BANANA, stream=True, max_tokens=400, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 20
    while running(server) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert running(server) == 0
    assert ask(server, "auto", "Spell banana backwards") == ("reverse", "ananab")


def running(server: Any) -> int:
    lines = server.http.get("/metrics").text.splitlines()
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running")))


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"messages": []}, 400),
        ({"messages": 5}, 400),
        ({"messages": [{"role": "user", "content": "a " * 5000}]}, 400),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]}
                ]
            },
            400,
        ),
        ({"messages": [{"content": "no role"}]}, 400),
        ({"temperature": "hot"}, 400),
        ({"max_tokens": -1}, 400),
        ({"n": 0}, 400),
        ({"model": 5}, 400),
        ({"model": "auto:nonsense"}, 404),
        ({"logprobs": True, "top_logprobs": 10**6}, 400),
        ({"messages": [{"role": "user", "content": ""}], "max_tokens": 1}, 200),
        ({"messages": [{"role": "user", "content": "日本語 🙂 \u0000"}], "max_tokens": 1}, 200),
        ({"some_unknown_field": 1, "max_tokens": 1}, 200),
        ({"prompt_logprobs": 2, "max_tokens": 1}, 200),
    ],
)
def test_odd_requests_get_a_clear_answer(server, change, status):
    response = server.http.post("/v1/chat/completions", json={"model": "auto", "messages": BANANA, **change})
    assert response.status_code == status, response.text
    if status != 200:
        assert response.json()["error"]["message"]
        assert "Traceback" not in response.text


@pytest.mark.parametrize("path", OTHERS)
def test_the_engine_s_other_endpoints_stay_inside(server, path):
    assert server.http.post(path, json={"model": "quickstart", "messages": BANANA}).status_code == 404


def variant(testbed: Any, folder: Path, name: str, change: Any) -> Path:
    """A copy of an expert's adapter with every weight changed by `change(key, tensor)`."""
    shutil.copytree(testbed.folder / "experts" / name, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {key: change(key, value).contiguous() for key, value in weights.items()}, folder / "adapter_model.safetensors"
    )
    return folder


def upload(server: Any, folder: Path, **about: Any) -> httpx.Response:
    names = ("adapter_config.json", "adapter_model.safetensors")
    files = [("files", (name, (folder / name).read_bytes())) for name in names]
    return server.http.post("/v1/experts", data={"expert": json.dumps(about)}, files=files)


def test_a_new_expert_answers_the_next_request(server, testbed, tmp_path):
    folder = variant(testbed, tmp_path / "new", "reverse", lambda _, value: value * 1.001)
    samples = [f"Which way does zebra {i} run over the violet glacier?" for i in range(5)]
    response = upload(server, folder, name="zebra", samples=samples)
    assert response.status_code == 201, response.text
    assert response.json()["state"] == "active"
    assert response.json()["checks"][0]["value"] > 0.1
    assert ask(server, "auto", "Which way does zebra 9 run over the violet glacier?")[0] == "zebra"
    assert server.http.delete("/v1/experts/zebra").status_code == 200
    assert ask(server, "auto", "Spell banana backwards") == ("reverse", "ananab")
    with pytest.raises(openai.NotFoundError):
        ask(server, "zebra", "hello")


def test_an_adapter_that_changes_nothing_is_quarantined_with_the_figure(server, testbed, tmp_path):
    folder = variant(testbed, tmp_path / "quiet", "vowels", lambda key, value: value * (1e-9 if "lora_B" in key else 1))
    response = upload(server, folder, name="quiet")
    assert response.status_code == 201
    assert response.json()["state"] == "quarantined"
    assert "log-probabilities by up to" in response.json()["reasons"][0]
    with pytest.raises(openai.NotFoundError):
        ask(server, "quiet", "hello")
    server.http.delete("/v1/experts/quiet")


def test_a_corrupt_upload_is_refused_and_leaves_nothing(server, testbed, tmp_path):
    folder = shutil.copytree(testbed.folder / "experts" / "vowels", tmp_path / "broken")
    (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 64)
    response = upload(server, folder, name="broken")
    assert response.status_code == 422
    assert response.json()["error"]["reasons"]
    assert server.http.get("/v1/experts/broken").status_code == 404


def test_metrics_are_vllm_s_and_our_own(server):
    text = server.http.get("/metrics").text
    assert "vllm:num_requests_running" in text
    assert "moerge_requests_total" in text
    assert "moerge_route_seconds_bucket" in text
