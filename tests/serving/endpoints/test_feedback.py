"""`POST /v1/feedback`: decisions are kept behind the requests, and judged by whoever made them."""

from __future__ import annotations

import asyncio
import functools

import numpy as np
import pytest
from prometheus_client import REGISTRY

from adapters_registry.errors import StoreFull

REVERSE = "spell cherry backwards"


@pytest.fixture
def serve(serve):
    """A server that routes by retrieval, whatever the default is."""
    return functools.partial(serve, router={"method": "retrieval", "methods": {"retrieval": {}}})


async def decided(world, prompt=REVERSE, model="auto", **more):
    response = await world.ask(model, prompt, **more)
    assert response.status_code == 200, response.text
    return response.headers["x-moerge-decision-id"]


async def judge(world, decision, score=1.0, headers=None, **more):
    body = {"decision_id": decision, "score": score, **more}
    return await world.http.post("/v1/feedback", json=body, headers=headers)


async def keys(world, **owners):
    """`x-api-key` headers by owner."""
    made = {}
    for owner, scopes in owners.items():
        _, token = await asyncio.to_thread(world.registry.keys.create, owner, scopes)
        made[owner] = {"x-api-key": token}
    world.service.authenticator._needed.clear()
    return made


async def test_an_answer_can_be_judged_at_once(world):
    decision = await decided(world)
    response = await judge(world, decision, 0.75, comment="nearly")
    assert response.status_code == 200
    body = response.json()
    assert body.pop("rated_at")
    assert body == {
        "object": "feedback",
        "decision_id": decision,
        "score": 0.75,
        "comment": "nearly",
        "experts": ["reverse"],
    }
    (kept,) = await asyncio.to_thread(world.registry.decisions.rated)
    assert (kept.id, kept.score, kept.kind, kept.method) == (decision, 0.75, "select", "retrieval")
    assert kept.encoder == world.service.router.encoder_id
    np.testing.assert_allclose(kept.vector, world.service.router.encoder.encode([REVERSE])[0], atol=1e-3)
    assert kept.text is None, "texts are not kept unless asked for"


async def test_the_same_judgement_twice_is_one_and_the_last_word_counts(world):
    decision = await decided(world)
    first, again = [(await judge(world, decision, 1)).json() for _ in range(2)]
    assert first == again
    assert (await judge(world, decision, 0)).json()["score"] == 0
    assert [each.score for each in await asyncio.to_thread(world.registry.decisions.rated)] == [0]


async def test_texts_are_kept_when_the_operator_wants_them(serve):
    async with serve(feedback={"keep_text": True}) as world:
        body = b'{"messages": [{"role": "user", "content": "spell \\ud83d cherry \\u0000 backwards"}]}'
        response = await world.http.post("/v1/chat/completions", content=body)
        await judge(world, response.headers["x-moerge-decision-id"])
        (kept,) = await asyncio.to_thread(world.registry.decisions.rated)
        assert kept.text == "spell ? cherry   backwards"


async def test_every_routed_answer_can_be_judged_abstentions_and_streams_too(world):
    abstained = await decided(world, "zebra quartz")
    streamed = await decided(world, stream=True)
    assert (await judge(world, abstained)).json()["experts"] == []
    assert (await judge(world, streamed)).json()["experts"] == ["reverse"]


@pytest.mark.parametrize("model", ["tiny", "reverse"])
async def test_what_the_client_chose_itself_is_not_judged(world, model):
    response = await judge(world, await decided(world, model=model))
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "decision_not_found"


async def test_a_decision_that_was_only_explained_is_not_judged(world):
    body = (await world.http.post("/v1/route", json={"prompt": REVERSE})).json()
    assert (await judge(world, body["decision"]["id"])).status_code == 404


async def test_only_whoever_asked_may_judge(serve):
    async with serve() as world:
        key = await keys(world, ann=["infer"], bob=["infer"], operator=["admin"])
        decision = await decided(world, headers=key["ann"])
        refused = await judge(world, decision, headers=key["bob"])
        unknown = await judge(world, decision[:-1] + "x", headers=key["bob"])
        assert refused.status_code == unknown.status_code == 404
        said = [each.json()["error"]["message"].partition(":")[2] for each in (refused, unknown)]
        assert said[0] == said[1], "somebody else's decision and none look alike"
        assert (await judge(world, decision)).status_code == 401
        assert (await judge(world, decision, headers=key["ann"])).status_code == 200
        assert (await judge(world, decision, headers=key["operator"])).status_code == 200


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"decision_id": "x", "score": NaN}', "score"),
        (b'{"decision_id": "x", "score": Infinity}', "score"),
        (b'{"decision_id": "x", "score": 1.1}', "score: Input should be less than or equal to 1"),
        (b'{"decision_id": "x", "score": -1}', "score"),
        (b'{"decision_id": "x", "score": "good"}', "score"),
        (b'{"decision_id": "x", "score": true}', "score"),
        (b'{"decision_id": "x"}', "score: Field required"),
        (b'{"score": 1}', "decision_id: Field required"),
        (b'{"decision_id": 7, "score": 1}', "decision_id"),
        (b'{"decision_id": "a\\u0000b", "score": 1}', "decision_id"),
        (b'{"decision_id": "x", "score": 1, "comment": "' + b"x" * 2001 + b'"}', "comment"),
        (b'{"decision_id": "x", "score": 1, "comment": "\\ud83d"}', "comment"),
        (b'{"decision_id": "x", "score": 1, "mood": "good"}', "mood"),
        (b"[]", ""),
        (b"{", ""),
    ],
)
async def test_what_is_no_judgement_is_refused_with_the_reason(world, body, says):
    response = await world.http.post("/v1/feedback", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]


async def test_judgements_survive_a_restart(serve):
    async with serve() as world:
        decision, unjudged = await decided(world), await decided(world)
        await judge(world, decision)
    async with serve() as world:
        assert [each.id for each in await asyncio.to_thread(world.registry.decisions.rated)] == [decision]
        assert (await judge(world, unjudged)).status_code == 200, "stopping had written what was waiting"


async def test_a_server_that_keeps_nothing_says_so(serve):
    async with serve(feedback={"keep": 0}) as world:
        response = await judge(world, await decided(world))
        assert response.status_code == 400
        assert "feedback.keep" in response.json()["error"]["message"]
        assert await asyncio.to_thread(world.registry.decisions.count) == 0


async def test_a_database_that_fails_costs_decisions_and_no_answers(world, monkeypatch, caplog):
    def full(decisions):
        raise StoreFull("here")

    monkeypatch.setattr(world.registry.decisions, "add", full)
    decision = await decided(world)
    monkeypatch.undo()
    assert (await judge(world, decision)).status_code in (200, 404)
    monkeypatch.setattr(world.registry.decisions, "add", full)
    lost = await decided(world)
    assert (await judge(world, lost)).status_code == 404
    assert "decisions are not kept: No space left" in caplog.text


async def test_decisions_are_dropped_rather_than_piled_up(world, monkeypatch):
    monkeypatch.setattr("serving.feedback.QUEUE", 0)
    before = REGISTRY.get_sample_value("moerge_decisions_total", {"outcome": "dropped"}) or 0
    decision = await decided(world)
    assert REGISTRY.get_sample_value("moerge_decisions_total", {"outcome": "dropped"}) == before + 1
    assert (await judge(world, decision)).status_code == 404


async def test_decisions_are_written_without_anybody_asking_and_old_ones_go(serve, monkeypatch, until):
    monkeypatch.setattr("serving.feedback.PAUSE", 0.01)
    monkeypatch.setattr("serving.feedback.TIDY", 0.0)
    async with serve(feedback={"keep": 2}) as world:
        count = world.registry.decisions.count
        for _ in range(5):
            await decided(world)
        for _ in range(2000):
            if await asyncio.to_thread(count) == 2:
                break
            await asyncio.sleep(0.005)
        assert await asyncio.to_thread(count) == 2
