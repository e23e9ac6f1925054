"""Blends on the real server: many at once, each as alone; how they may be asked for; members that leave.

After the files that use the server as it starts: its groups stay when this file is done.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.serving.vllm.conftest import MESSAGES, chat, said

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

#: Nats by which two tokens may differ that rounding may exchange.
TIE = 1e-3

WEIGHTS = (
    {"reverse": 0.7, "uppercase": 0.3},
    {"reverse": 0.5, "plural": 0.3, "roman": 0.2},
    {"sort-words": 1.1, "json": -0.2},
    {"iso-date": 0.4, "vowels": 0.6},
)
OPERATORS: dict[str, dict[str, Any]] = {
    "cat": {},
    "linear": {},
    "svd": {"rank": 8},
    "task_arithmetic": {"scale": 0.8},
    "ties": {"density": 0.3},
    "dare_linear": {"seed": 3},
    "magnitude_prune": {},
    "breadcrumbs": {},
    "knots": {},
    "lego": {},
}
#: 30 different ones: every operator with three sets of weights.
BLENDS = [
    {"experts": WEIGHTS[(i + k) % 4], "operator": operator, "settings": settings}
    for i, (operator, settings) in enumerate(OPERATORS.items())
    for k in range(3)
]
COMPOSITES = [
    {"experts": ["reverse", "uppercase", "roman"], "gate": "arrow"},
    {"experts": {"reverse": 0.7, "uppercase": 0.3}},
    {"experts": {"reverse": 0.2, "uppercase": 0.8}},
]
PLAIN = ("reverse", "uppercase", "sort-words", "json", "quickstart", "quickstart")
#: Who is asked, as it stands in the body: 30 blends, 4 experts, the base model and composites.
MODELS: list[dict[str, Any]] = [
    *({"model": "auto", "moerge": each} for each in (*BLENDS, *COMPOSITES)),
    *({"model": each} for each in PLAIN),
]


def metric(server: Any, name: str) -> float:
    """Summed over its labels."""
    lines = server.http.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


def reaches(server: Any, name: str, least: float) -> bool:
    """Gauges are set once in a while."""
    deadline = time.monotonic() + 60
    while metric(server, name) < least and time.monotonic() < deadline:
        time.sleep(0.2)
    return metric(server, name) >= least


def agree(alone: dict[str, Any], together: dict[str, Any]) -> bool:
    """The same tokens, up to one that was as likely as another but for rounding."""
    pairs = zip(alone["token_ids"], together["token_ids"], strict=True)
    differs = next((k for k, (a, b) in enumerate(pairs) if a != b), None)
    if differs is None:
        return True
    best, second = sorted(alone["logprobs"]["top_logprobs"][differs].values())[-2:][::-1]
    return bool(best - second < TIE)


def test_200_requests_with_30_blends_on_4_slots_are_answered_as_each_is_alone(server, testbed):
    """More adapters at once than the server keeps loaded (6) or the engine has slots (4)."""
    prompts = [testbed.tests[name][i]["prompt"] for i, name in enumerate(("reverse", "sort-words"))]
    bodies = [{**model, "prompt": prompt} for prompt in prompts for model in MODELS]
    common = {"max_tokens": 16, "temperature": 0, "ignore_eos": True, "logprobs": 2, "return_token_ids": True}

    async def ask(http: httpx.AsyncClient, body: dict[str, Any], salt: str) -> dict[str, Any]:
        """With another salt nothing comes from the prefix cache."""
        response = await http.post("/v1/completions", json={**body, **common, "cache_salt": salt})
        assert response.status_code == 200, response.text
        choice: dict[str, Any] = response.json()["choices"][0]
        assert len(choice["token_ids"]) == 16
        return choice

    async def run() -> tuple[list[dict[str, Any]], list[int], list[dict[str, Any]]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as http:
            alone = [await ask(http, body, "alone") for body in bodies]
            order = [i % len(bodies) for i in range(200)]
            random.Random(0).shuffle(order)
            together = await asyncio.gather(*(ask(http, bodies[i], "together") for i in order))
        return alone, order, together

    loads = metric(server, "moerge_adapter_loads")
    alone, order, together = asyncio.run(run())
    wrong = [bodies[i] for i, answer in zip(order, together, strict=True) if not agree(alone[i], answer)]
    assert not wrong
    distinct = {json.dumps([body["moerge"]], sort_keys=True) for body in bodies if "moerge" in body}
    assert len(distinct) == 33
    assert reaches(server, "moerge_adapter_loads", loads + 2 * len(BLENDS))  # they came, went, and came again
    assert metric(server, "moerge_blends_total") >= len(BLENDS)
    answers = {tuple(alone[i]["token_ids"]) for i in range(len(BLENDS))}
    assert len(answers) > 10  # they are not all the same


MIX = {"reverse": 0.7, "uppercase": 0.3}


def test_a_stored_blend_answers_by_name_and_by_content_as_when_it_is_named_in_the_request(server):
    moerge = {"experts": MIX, "operator": "ties", "settings": {"density": 0.4}}
    wanted = {"name": "louder", "members": MIX, "operator": "ties", "density": 0.4}
    stored = server.http.post("/v1/blends", json=wanted)
    assert stored.status_code == 201, stored.text
    content = stored.json()["id"]
    adhoc = chat(server, moerge=moerge)
    assert adhoc.json()["model"] == content
    assert adhoc.headers["x-moerge-operator"] == "ties"
    for model in ("louder", content):
        response = server.openai.chat.completions.with_raw_response.create(
            model=model, messages=MESSAGES, temperature=0, max_tokens=40
        )
        assert response.headers["x-moerge-experts"] == adhoc.headers["x-moerge-experts"]
        assert (response.parse().choices[0].message.content or "").strip() == said(adhoc)
    assert {"louder", "auto", "reverse"} <= {each.id for each in server.openai.models.list()}
    assert server.http.delete("/v1/blends/louder").status_code == 200
    chat(server, "louder", status=404)
    chat(server, content, status=404)
    assert said(chat(server, moerge=moerge)) == said(adhoc)


def test_the_router_s_best_three_answer_together(server):
    mixed = chat(server, "auto:centroids")
    shares = dict(each.split("=") for each in mixed.headers["x-moerge-experts"].split(","))
    weights = {name: float(weight) for name, weight in shares.items()}
    assert mixed.headers["x-moerge-operator"] == "cat"
    assert len(weights) == 3
    assert "reverse" in weights
    assert sum(weights.values()) == pytest.approx(1)
    named = chat(server, moerge={"experts": weights, "operator": "cat"})
    assert said(named) == said(mixed)
    assert named.json()["model"] == mixed.json()["model"]
    merged = chat(server, "auto:centroids", moerge={"operator": "ties"})
    assert merged.headers["x-moerge-operator"] == "ties"
    assert merged.headers["x-moerge-experts"] == mixed.headers["x-moerge-experts"]


def test_a_blend_by_cat_has_peft_s_log_probabilities(server, testbed):
    """Other ranks, a rank pattern, rsLoRA, attention only, a negative weight; PEFT's first one is without rsLoRA."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = {"roman": 0.5, "sort-words": 0.4, "json": -0.3, "iso-date": 0.6}
    names = list(weights)
    tokenizer = AutoTokenizer.from_pretrained(testbed.folder / "base")
    base = AutoModelForCausalLM.from_pretrained(testbed.folder / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, testbed.folder / "experts" / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(testbed.folder / "experts" / name, adapter_name=name)
    model.add_weighted_adapter(names, list(weights.values()), "blend", combination_type="cat")
    model.set_adapter("blend")
    for name in names:
        ids = tokenizer(testbed.tests[name][1]["prompt"], add_special_tokens=False)["input_ids"]
        body = {"model": "auto", "moerge": {"experts": weights, "operator": "cat"}, "prompt": ids}
        response = server.http.post("/v1/completions", json={**body, "max_tokens": 1, "prompt_logprobs": 0})
        assert response.status_code == 200, response.text
        found = response.json()["choices"][0]["prompt_logprobs"][1:]
        served = torch.tensor([step[str(token)]["logprob"] for step, token in zip(found, ids[1:], strict=True)])
        with torch.inference_mode():
            logprobs = model.eval()(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(served, expected, atol=1e-4, rtol=0)


@pytest.fixture
def fleeting(server, testbed, tmp_path: Path) -> str:
    """An expert of its own, to be retired."""
    source = testbed.folder / "experts" / "reverse"
    weights = load_file(source / "adapter_model.safetensors")
    save_file({key: value * 1.02 for key, value in weights.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    parts = [("files", (each.name, each.read_bytes())) for each in tmp_path.iterdir()]
    about = {"name": "fleeting", "samples": ["a sample like no other"]}
    assert server.http.post("/v1/experts", data={"expert": json.dumps(about)}, files=parts).status_code == 201
    return "fleeting"


def test_a_member_can_be_retired_while_its_blend_answers(server, fleeting):
    members = {fleeting: 0.7, "uppercase": 0.3}
    stored = server.http.post("/v1/blends", json={"name": "passing", "members": members})
    assert stored.status_code == 201, stored.text
    begun, ended = threading.Event(), list[str]()

    def read() -> None:
        stream = server.openai.chat.completions.create(
            model="passing",
            messages=MESSAGES,
            stream=True,
            temperature=0,
            max_tokens=200,
            extra_body={"ignore_eos": True},
        )
        for chunk in stream:
            begun.set()
            ended.extend(each.finish_reason for each in chunk.choices if each.finish_reason)

    thread = threading.Thread(target=read)
    thread.start()
    assert begun.wait(60)
    assert server.http.post(f"/v1/experts/{fleeting}/retire").status_code == 200
    refused = server.http.post("/v1/chat/completions", json={"model": "passing", "messages": MESSAGES})
    assert refused.status_code in (404, 409, 422), refused.text
    assert fleeting in refused.json()["error"]["message"]
    adhoc = chat(server, status=404, moerge={"experts": members, "operator": "cat"})
    assert fleeting in adhoc.json()["error"]["message"]
    thread.join(120)
    assert ended == ["length"]
    assert server.http.get("/v1/blends/passing").json()["usable"] is False
    assert server.http.delete("/v1/blends/passing").status_code == 200
    assert server.http.delete(f"/v1/experts/{fleeting}").status_code == 200
    assert said(chat(server)) == "ananab"


@pytest.mark.parametrize(
    ("moerge", "status", "says"),
    [
        ({"experts": {"reverse": 1, "unheard-of": 1}, "operator": "cat"}, 404, "unheard-of"),
        ({"experts": {"reverse": 0, "uppercase": 0}, "operator": "cat"}, 400, "zero"),
        ({"experts": {"reverse": 1, "uppercase": 1}, "operator": "stir"}, 400, "stir"),
        ({"experts": MIX, "operator": "ties", "settings": {"density": 2}}, 400, "density"),
        ({"experts": MIX, "operator": "fisher"}, 422, "moerge expert stats"),
        ({"experts": MIX, "operator": "svd", "settings": {"rank": 128}}, 422, "128"),
        ({"experts": MIX, "operator": "cat", "gate": "arrow"}, 400, "only one"),
    ],
)
def test_blends_that_cannot_be_are_refused_clearly(server, moerge, status, says):
    refused = chat(server, status=status, moerge=moerge)
    assert says in refused.json()["error"]["message"]
    assert said(chat(server)) == "ananab"  # the engine is well


def test_a_group_s_resident_composite_answers_as_the_blend(server):
    """Last: the groups stay."""
    assert server.http.post("/v1/groups/build", json={"by": "weights", "gates": ["constant"]}).status_code == 200
    groups = [set(each["experts"]) for each in server.http.get("/v1/groups").json()["data"]]
    pair = sorted(groups[0])[:2]
    moerge = {"experts": dict(zip(pair, (0.7, 0.3), strict=True)), "operator": "cat"}
    built = metric(server, "moerge_blends_total")
    grouped = chat(server, moerge=moerge, logprobs=True)
    assert grouped.json()["model"] == "auto:constant"
    assert metric(server, "moerge_blends_total") == built
    alone = chat(server, moerge={**moerge, "settings": {"rank": 64}}, logprobs=True)  # a rank: no composite's sum
    assert alone.json()["model"].startswith("blend:")
    pairs = [response.json()["choices"][0]["logprobs"]["content"] for response in (grouped, alone)]
    assert [each["token"] for each in pairs[0]] == [each["token"] for each in pairs[1]]
    assert max(abs(a["logprob"] - b["logprob"]) for a, b in zip(*pairs, strict=True)) < 1e-3
