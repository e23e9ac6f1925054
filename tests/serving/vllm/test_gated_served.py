"""Gates on the real server: composites built on demand, probes, weights from the request, traces, what is refused."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.serving.vllm.conftest import MESSAGES, PROMPT, chat, said

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]


def experts_of(response: Any) -> dict[str, float]:
    pairs = [each.partition("=") for each in response.headers["x-moerge-experts"].split(",")]
    return {name: float(weight) for name, _, weight in pairs}


@pytest.mark.parametrize("gate", ["arrow", "spectr", "lag", "smile", "hilora", "constant", "evidence"])
def test_every_gate_answers_for_a_shortlist(server, gate):
    response = chat(server, f"auto:{gate}")
    assert response.json()["model"] == f"auto:{gate}"
    assert response.headers["x-moerge-method"] == gate
    assert "reverse" in experts_of(response)
    assert len(experts_of(response)) == 4
    assert said(chat(server, f"auto:{gate}")) == said(response)


def test_a_probe_reads_the_prompt_and_one_expert_answers(server):
    response = chat(server, "auto:probe", moerge={"trace": True})
    assert experts_of(response) == {"reverse": 1.0}  # as retrieval's prior says, which counts beside the evidence
    assert response.json()["model"] == "reverse"
    assert said(response) == "ananab"
    trace = server.http.get(response.headers["x-moerge-trace"]).json()
    assert trace["gate"] == "probe"
    assert any(trace["evidence"])
    assert all(weight == 0 for row in trace["weights"] for weight in row)


def test_a_weight_of_one_is_the_expert_itself_and_zero_is_its_absence(server):
    alone = chat(server, "reverse", logprobs=True)
    for experts in ({"reverse": 1, "uppercase": 0}, {"uppercase": 0.0, "reverse": 1.0}):
        mixed = chat(server, moerge={"experts": experts}, logprobs=True)
        assert said(mixed) == said(alone) == "ananab"
        pairs = [
            (a["logprob"], b["logprob"])
            for a, b in zip(
                alone.json()["choices"][0]["logprobs"]["content"],
                mixed.json()["choices"][0]["logprobs"]["content"],
                strict=True,
            )
        ]
        assert max(abs(a - b) for a, b in pairs) < 0.02  # other factors of the same product
    assert said(chat(server, moerge={"experts": {"reverse": 0, "uppercase": 1}})) == said(chat(server, "uppercase"))


def test_a_trace_shows_what_every_layer_and_token_used(server):
    response = chat(server, "auto:arrow", moerge={"trace": True})
    trace = server.http.get(response.headers["x-moerge-trace"]).json()
    assert trace["id"] == response.headers["x-moerge-decision-id"]
    assert trace["experts"] == list(experts_of(response))
    usage = response.json()["usage"]
    assert usage["prompt_tokens"] <= trace["tokens"] <= usage["total_tokens"]
    assert len(trace["top"]) == trace["tokens"]
    assert set(trace["top"]) <= set(range(4))
    assert len(trace["weights"]) == len(trace["groups"]) > 4
    for row in trace["weights"]:
        assert sum(row) == pytest.approx(1, abs=1e-3)


def test_a_stream_is_traced_by_the_time_it_has_ended(server):
    raw = server.openai.chat.completions.with_raw_response.create(
        model="auto:spectr",
        messages=MESSAGES,
        stream=True,
        max_tokens=10,
        temperature=0,
        extra_body={"moerge": {"trace": True}},
    )
    assert [chunk for chunk in raw.parse() if chunk.choices]
    assert server.http.get(raw.headers["x-moerge-trace"]).json()["tokens"] > 0


def test_a_route_can_be_traced_without_generating(server):
    body = {"model": "auto:evidence", "messages": MESSAGES, "trace": True}
    explained = server.http.post("/v1/route", json=body).json()
    assert explained["decision"]["gate"] == "evidence"
    assert explained["trace"]["experts"] == [each["expert"] for each in explained["decision"]["experts"]]
    assert any(abs(each) > 0 for each in explained["trace"]["evidence"])


def test_every_path_takes_weights(server):
    moerge = {"experts": {"reverse": 1.0, "uppercase": 0.0}}
    completion = server.http.post(
        "/v1/completions", json={"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "moerge": moerge}
    )
    response = server.http.post(
        "/v1/responses", json={"input": PROMPT, "max_output_tokens": 40, "temperature": 0, "moerge": moerge}
    )
    message = server.http.post(
        "/v1/messages", json={"messages": MESSAGES, "max_tokens": 40, "temperature": 0, "moerge": moerge}
    )
    assert completion.status_code == 200
    assert response.json()["output"][0]["content"][0]["text"].strip() == "ananab"
    assert message.json()["content"][0]["text"].strip() == "ananab"


SIXTEEN = ["add", "initials", "opposite", "plural", "reverse"]  # of rank 16: 80 rows


@pytest.mark.parametrize(
    ("moerge", "status", "says"),
    [
        ({"experts": []}, 400, "1 to 64"),
        ({"experts": ["reverse"], "gate": "arrow", "trace": True, "settings": {}}, 200, ""),
        ({"experts": {"reverse": 0.5}}, 422, "at least two"),
        ({"experts": ["reverse", "reverse"]}, 400, "twice"),
        ({"experts": ["reverse", "unheard-of"]}, 404, "unheard-of"),
        ({"experts": SIXTEEN}, 422, "80 rank rows"),
        ({"experts": {"reverse": 1, "add": float("inf")}}, 400, "finite"),
        ({"experts": {"reverse": 1, "add": 1}, "gate": "arrow"}, 400, "weights itself"),
        ({"experts": {"reverse": 1, "add": 0}, "gate": "evidence"}, 400, "above 0"),
        ({"experts": ["reverse", "add"], "gate": "nonsense"}, 400, "nonsense"),
        ({"experts": ["reverse", "add"], "gate": "arrow", "settings": {"top_k": 0}}, 400, "top_k"),
        ({"experts": ["reverse", "add"], "gate": "phatgoose"}, 422, "moerge gates train"),
        ({"froce": 1}, 400, "froce"),
        ("yes", 400, "moerge"),
    ],
)
def test_what_cannot_be_is_refused_clearly(server, moerge, status, says):
    body = json.dumps({"model": "auto", "messages": MESSAGES, "max_tokens": 3, "moerge": moerge})
    response = server.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == status, response.text
    if status != 200:
        assert says in response.json()["error"]["message"]
    assert said(chat(server)) == "ananab"  # the engine is well


def test_the_server_s_own_arguments_are_refused(server):
    response = chat(server, "reverse", status=400, vllm_xargs={"moerge_weights": [1, 2, 3]})
    assert "moerge_weights" in response.json()["error"]["message"]


def test_a_member_can_be_retired_while_its_composite_answers(server, testbed, tmp_path):
    folder = tmp_path / "doubled"
    folder.mkdir()
    source = testbed.folder / "experts" / "reverse"
    weights = load_file(source / "adapter_model.safetensors")
    save_file({key: value * 1.01 for key, value in weights.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    parts = [("files", (each.name, each.read_bytes())) for each in folder.iterdir()]
    about = {"name": "fleeting", "samples": ["a sample like no other"]}
    assert server.http.post("/v1/experts", data={"expert": json.dumps(about)}, files=parts).status_code == 201
    moerge = {"experts": ["fleeting", "uppercase"], "gate": "arrow"}
    begun, ended = threading.Event(), list[str]()

    def read() -> None:
        stream = server.openai.chat.completions.create(
            model="auto",
            messages=MESSAGES,
            stream=True,
            temperature=0,
            max_tokens=100,
            extra_body={"moerge": moerge, "ignore_eos": True},
        )
        for chunk in stream:
            begun.set()
            ended.extend(each.finish_reason for each in chunk.choices if each.finish_reason)

    thread = threading.Thread(target=read)
    thread.start()
    assert begun.wait(60)
    assert server.http.post("/v1/experts/fleeting/retire").status_code == 200
    refused = chat(server, status=404, moerge=moerge)
    assert "fleeting" in refused.json()["error"]["message"]
    thread.join(120)
    assert ended == ["length"]
    assert server.http.delete("/v1/experts/fleeting").status_code == 200


def test_what_is_built_and_measured_is_counted(server):
    text = server.http.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("moerge_"))
    assert float(values['moerge_composites_total{gate="arrow",outcome="built"}']) >= 1
    assert float(values["moerge_calibrations_total"]) >= 4
    assert float(values["moerge_composite_bytes"]) > 0
