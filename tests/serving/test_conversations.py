"""Decisions stay through a conversation, and near-ties go to whoever is loaded."""

from __future__ import annotations

import asyncio
import json
import math

import pytest

from router.decision import Candidate, Decision, Weighted
from router.method import Standing
from serving.conversations import NearTies, gain_of, hashes, turn_of

REVERSE, LOUD = "spell cherry backwards", "write cherry loudly"


@pytest.fixture
def serve(serve):
    """A server that routes by retrieval, whatever the default is."""

    def running(*, router=None, **given):
        return serve(router={"method": "retrieval", "methods": {"retrieval": {}}, **(router or {})}, **given)

    return running


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


async def chat(world, *turns, path="/v1/chat/completions", field="messages", **more):
    response = await world.http.post(path, json={field: list(turns), **more}, headers=more.pop("headers", None))
    assert response.status_code == 200, response.text
    return response


def who(response):
    return response.headers["x-moerge-experts"]


async def explained(world, *turns, **more):
    return (await world.http.post("/v1/route", json={"messages": list(turns), **more})).json()["decision"]


# Who goes on


async def test_a_follow_up_that_says_little_stays_with_the_expert(world):
    first = await chat(world, user(REVERSE))
    turns = [user(REVERSE), assistant("yrrehc"), user("zebra quartz")]
    assert who(await chat(world, user("zebra quartz"))) == "", "alone it is nobody's"
    decision = await explained(world, *turns)
    assert who(first) == who(await chat(world, *turns)) == "reverse=1"
    assert decision["reason"].startswith("kept from the conversation: reverse; no expert is near enough")
    assert "about 7 tokens of cached prefix" in decision["reason"]
    assert decision["experts"][0]["expert"] == "reverse"
    assert len(decision["candidates"]) == 3


async def test_clear_evidence_changes_the_expert_and_says_what_it_costs(world):
    await chat(world, user(REVERSE))
    turns = [user(REVERSE), assistant("yrrehc"), user(LOUD)]
    decision = await explained(world, *turns)
    assert who(await chat(world, *turns)) == "shout=1"
    assert decision["reason"].startswith("not kept from the conversation: reverse; shout gains ")
    assert "at the cost of about 7 tokens" in decision["reason"]


async def test_evidence_within_the_margin_does_not(serve):
    async with serve(router={"stickiness": 1000}) as world:
        await chat(world, user(REVERSE))
        turns = [user(REVERSE), assistant("yrrehc"), user(LOUD)]
        decision = await explained(world, *turns)
        assert who(await chat(world, *turns)) == "reverse=1"
        assert "the new best, shout, would gain" in decision["reason"]
        assert "(margin 1000)" in decision["reason"]
        assert 0 <= decision["confidence"] < 0.5


async def test_the_latest_turn_is_what_counts(world):
    await chat(world, user(REVERSE))
    second = [user(REVERSE), assistant("yrrehc"), user(LOUD)]
    await chat(world, *second)
    assert who(await chat(world, *second, assistant("CHERRY"), user("zebra quartz"))) == "shout=1"


async def test_from_the_base_model_an_expert_takes_over_by_the_margin_too(serve):
    for stickiness, name in ((0.5, "reverse=1"), (1000, "")):
        async with serve(router={"stickiness": stickiness}) as world:
            await chat(world, user("zebra quartz"))
            assert who(await chat(world, user("zebra quartz"), assistant("what?"), user(REVERSE))) == name


async def test_streaming_and_anthropic_and_responses_clients_keep_their_expert(world):
    for path, field, more in (
        ("/v1/chat/completions", "messages", {"stream": True}),
        ("/v1/messages", "messages", {"system": "be brief", "max_tokens": 5}),
        ("/v1/responses", "input", {"instructions": "be brief"}),
    ):
        first = await chat(world, user(REVERSE), path=path, field=field, **more)
        turns = [user(REVERSE), assistant(f"yrrehc, said {path}"), user("zebra quartz")]
        assert who(await chat(world, *turns, path=path, field=field, **more)) == who(first) == "reverse=1"


async def test_what_clients_move_about_between_turns_does_not_count(world):
    marked = [{"type": "text", "text": REVERSE, "cache_control": {"type": "ephemeral"}}]
    await chat(world, user(marked), path="/v1/messages")
    turns = [user(REVERSE), assistant("yrrehc"), user("zebra quartz")]
    assert who(await chat(world, *turns, path="/v1/messages")) == "reverse=1"


async def test_requests_of_one_turn_are_never_sticky(world):
    await chat(world, user(REVERSE))
    assert who(await chat(world, user(REVERSE), user("zebra quartz"))) == "", "nobody has answered in between"
    assert who(await chat(world, user(LOUD))) == "shout=1"
    await world.http.post("/v1/completions", json={"prompt": REVERSE})
    assert who(await world.http.post("/v1/completions", json={"prompt": [REVERSE, "zebra quartz"]})) is not None


async def test_another_conversation_tenant_or_method_is_not_mixed_up(serve):
    async with serve() as world:
        made = {}
        for owner in ("ann", "bob"):
            _, token = await asyncio.to_thread(world.registry.keys.create, owner, ["infer"])
            made[owner] = {"x-api-key": token}
        world.service.authenticator._needed.clear()
        turns = [user(REVERSE), assistant("yrrehc"), user("zebra quartz")]
        await chat(world, user(REVERSE), headers=made["ann"])
        assert who(await chat(world, *turns, headers=made["bob"])) == ""
        assert who(await chat(world, *turns, headers=made["ann"], model="auto:retrieval")) == ""
        assert who(await chat(world, user("x"), *turns, headers=made["ann"])) == ""
        assert who(await chat(world, *turns, headers=made["ann"])) == "reverse=1"


async def test_stickiness_zero_decides_every_turn_anew(serve):
    async with serve(router={"stickiness": 0}) as world:
        await chat(world, user(REVERSE))
        assert who(await chat(world, user(REVERSE), assistant("yrrehc"), user("zebra quartz"))) == ""


async def test_an_expert_that_is_retired_in_mid_conversation_is_let_go(world):
    await chat(world, user(REVERSE))
    await asyncio.to_thread(world.registry.retire, "reverse")
    await world.service.refresh()
    turns = [user(REVERSE), assistant("yrrehc"), user(LOUD)]
    decision = await explained(world, *turns)
    assert who(await chat(world, *turns)) == "shout=1"
    assert "reverse, which answered so far, no longer does" in decision["reason"]


async def test_an_expert_that_could_not_be_loaded_is_tried_again_next_turn(world):
    world.engine.refuses.add("reverse")
    assert who(await chat(world, user(REVERSE))) == ""
    world.engine.refuses.clear()
    turns = [user(REVERSE), assistant("I am the base model"), user(REVERSE)]
    assert who(await chat(world, *turns)) == "reverse=1"


async def test_asking_how_a_request_would_be_routed_begins_no_conversation(world):
    await explained(world, user(REVERSE))
    assert who(await chat(world, user(REVERSE), assistant("yrrehc"), user("zebra quartz"))) == ""


@pytest.mark.parametrize("messages", [[7], ["text"], [], [None], [user(REVERSE), "x"]])
async def test_junk_has_no_turn(messages):
    assert await turn_of("auto", {"messages": messages}, None) is None


async def test_long_conversations_are_hashed_alike_in_a_thread(monkeypatch):
    body = {"messages": [user("a" * 100), assistant("\ud83d"), {"role": "tool", "content": 7}, user("b")]}
    here = await turn_of("auto", body, "ann")
    monkeypatch.setattr("serving.conversations.LONG", 1)
    assert await turn_of("auto", body, "ann") == here
    assert len(here.earlier) == 1
    assert here.tokens == 25


def test_no_two_beginnings_have_a_name_in_common():
    lists = [(("a", "b"),), (("ab", ""),), (("a",), ("b",)), (("", "ab"),), (("a", "b"), ("",))]
    names = [json.dumps(hashes(*each)) for each in lists]
    assert len(set(names)) == len(lists)
    assert hashes(("a", "b"), ("c",))[0] == hashes(("a", "b"))[0]


# What is gained


def decision(*scores, experts=("a",), kind="select", threshold=None):
    candidates = [Candidate(expert=name, version=1, score=score) for name, score in scores]
    chosen = [Weighted(expert=name, id=f"{name}@1") for name in experts] if kind != "base" else []
    return Decision(method="m", kind=kind, experts=chosen, candidates=candidates, threshold=threshold, confidence=0.8)


def test_the_gain_is_in_log_odds():
    standing = Standing(0.1, {})
    fresh = decision(("a", 0.9), ("b", 0.6), threshold=0.5)
    assert gain_of(decision(experts=["b"]), fresh, standing) == pytest.approx(3)
    assert gain_of(decision(experts=["a"]), fresh, standing) == 0
    assert gain_of(decision(experts=["b", "a"], kind="blend"), fresh, standing) == 0
    assert gain_of(decision(kind="base"), fresh, standing) == pytest.approx(4)
    assert gain_of(decision(experts=["gone"]), fresh, standing) == math.inf
    assert gain_of(decision(experts=["b"]), decision(("a", 0.4), kind="base", threshold=0.5), standing) == 0


# Near-ties


class Served:
    def __init__(self, name):
        self.name, self.id = name, f"{name}@1"


def ties(margin=0.5, loaded=("b@1",), thresholds=None):
    return NearTies(margin, lambda: frozenset(loaded), Served, lambda method: Standing(0.1, thresholds or {}))


def answers(near_ties, *scores):
    return near_ties.settled(decision(*scores)).experts[0].expert


def test_a_near_tie_goes_to_the_expert_that_is_loaded():
    settled = ties().settled(decision(("a", 0.50), ("b", 0.48)))
    assert settled.experts == (Weighted(expert="b", id="b@1"),)
    assert settled.reason == "a is better by 0.20 (a near-tie, within 0.5), but not loaded"
    assert settled.confidence == pytest.approx(0.8 * math.exp(-0.2))


def test_a_clear_best_a_loaded_best_or_nobody_loaded_stay_as_they_are():
    assert answers(ties(), ("a", 0.50), ("b", 0.44)) == "a"
    assert answers(ties(loaded=["a@1", "b@1"]), ("a", 0.50), ("b", 0.50)) == "a"
    assert answers(ties(loaded=[]), ("a", 0.50), ("b", 0.50)) == "a"
    assert answers(ties(margin=0), ("a", 0.50), ("b", 0.50)) == "a"
    assert answers(ties(thresholds={"b": 0.49}), ("a", 0.50), ("b", 0.48)) == "a", "under its own threshold"


def test_the_better_expert_is_not_passed_over_for_ever():
    near_ties = ties()
    first = [answers(near_ties, ("a", 0.50), ("b", 0.48)) for _ in range(9)]
    assert first == ["b", "b", "b", "a", "b", "b", "b", "a", "b"]


async def test_a_near_tie_is_settled_for_requests_and_not_for_explanations(serve):
    async with serve(router={"near_tie": 1000, "stickiness": 0}) as world:
        await chat(world, user(LOUD))
        assert (await explained(world, user(REVERSE)))["experts"][0]["expert"] == "reverse"
        assert who(await chat(world, user("spell loudly backwards"))) in ("shout=1", "reverse=1")
