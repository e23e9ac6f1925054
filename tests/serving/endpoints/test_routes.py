"""`POST /v1/route`: a decision explained."""

from __future__ import annotations

import pytest

REVERSE = "spell cherry backwards"


async def explain(world, **body):
    return await world.http.post("/v1/route", json=body)


async def test_every_candidate_is_listed_with_its_score(world):
    response = await explain(world, model="auto", messages=[{"role": "user", "content": REVERSE}])
    body = response.json()
    assert (body["object"], body["model"], body["text"]) == ("route", "auto", REVERSE)
    decision = body["decision"]
    assert decision["kind"] == "select"
    assert [each["expert"] for each in decision["experts"]] == ["reverse"]
    candidates = decision["candidates"]
    assert {each["expert"] for each in candidates} == {"count", "reverse", "shout"}
    scores = [each["score"] for each in candidates]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] >= decision["threshold"]
    assert {"encode", "search", "total"} <= decision["timings"].keys()
    assert decision["generation"] == world.service.generation
    assert world.engine.asked == []  # nothing is generated


async def test_abstaining_is_explained(world):
    decision = (await explain(world, prompt="zebra quartz")).json()["decision"]
    assert decision["kind"] == "base"
    assert decision["experts"] == []
    assert "under the threshold" in decision["reason"]
    assert len(decision["candidates"]) == 3


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": REVERSE},
        {"input": REVERSE},
        {"messages": [{"role": "system", "content": "spell cherry"}, {"role": "user", "content": "backwards"}]},
        {"messages": [{"role": "user", "content": REVERSE}], "stream": True, "temperature": 1, "tools": []},
    ],
)
async def test_any_inference_request_s_body_will_do(world, body):
    assert (await explain(world, **body)).json()["decision"]["experts"][0]["expert"] == "reverse"


async def test_the_explanation_is_what_would_happen(world):
    for prompt in (REVERSE, "write cherry loudly", "zebra quartz", ""):
        decision = (await explain(world, prompt=prompt)).json()["decision"]
        answer = await world.http.post("/v1/completions", json={"model": "auto", "prompt": prompt})
        chosen = decision["experts"][0]["expert"] if decision["experts"] else "tiny"
        assert answer.json()["model"] == chosen


async def test_a_method_can_be_asked_for(serve):
    async with serve(router={"methods": {"retrieval": {}, "base": {}}}) as world:
        decision = (await explain(world, model="auto:base", prompt=REVERSE)).json()["decision"]
        assert (decision["method"], decision["kind"]) == ("base", "base")


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"model": "auto:meteora", "prompt": "x"}, 404, "auto:meteora"),
        ({"model": "unheard-of", "prompt": "x"}, 404, "unheard-of"),
        ({"model": "reverse", "prompt": "x"}, 400, "answers itself"),
        ({"model": "tiny", "prompt": "x"}, 400, "answers itself"),
        ({"model": 7, "prompt": "x"}, 400, "'model'"),
        ({"model": "auto"}, 400, "Nothing to route"),
        ({}, 400, "Nothing to route"),
    ],
)
async def test_what_is_not_routed_says_why(world, body, status, says):
    response = await explain(world, **body)
    assert response.status_code == status
    assert says in response.json()["error"]["message"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"x"', b"[" * 100_000])
async def test_a_body_that_is_no_object_is_a_400(world, content):
    response = await world.http.post("/v1/route", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


async def test_before_the_experts_are_known_it_is_a_503(serve):
    async with serve(wait=False) as world:
        response = await explain(world, prompt="x")
        assert response.status_code == 503
        assert response.headers["retry-after"]
