"""Asking an endpoint by OpenAI's client: what is sent, what is read, and what happens when it fails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from eval.asking import Ask, EngineGone, Prompt, Reply
from eval.endpoint import FAILURES, Endpoint, in_lanes
from eval.recipe import Recipe

MATHS = Recipe.expert("maths")
BLEND = Recipe.blend({"maths": 0.5, "poetry": 0.5}, "ties", {"density": 0.3})
GATE = Recipe(kind="gate", gate="arrow", experts=(("maths", 1.0), ("poetry", 1.0)))
AUTO = Recipe(kind="model", model="auto")


def ask(recipe: Recipe = MATHS, text: str = "2 + 2 =", form: Any = "chat", system: str = "", **more: Any) -> Ask:
    return Ask(recipe=recipe, prompt=Prompt(text=text, form=form, system=system), **more)


async def asked(url: str, asks: Sequence[Ask], **options: Any) -> dict[Ask, Reply]:
    async with Endpoint(url, base="base", **{"retries": 0, **options}) as endpoint:
        return {each: reply async for each, reply in endpoint.answers(asks)}


async def one(url: str, question: Ask) -> Reply:
    return (await asked(url, [question]))[question]


async def test_what_is_asked_is_what_a_client_would_send(stranger):
    reply = await one(stranger.url, ask(system="Be brief.", stop=("\n",), max_tokens=9))
    (body,) = stranger.asked("/v1/chat/completions")
    assert body["model"] == "maths"
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2 ="}]
    assert (body["max_tokens"], body["stop"], body["temperature"]) == (9, ["\n"], 0)
    assert "moerge" not in body
    assert "seed" not in body
    assert reply.text == "maths: 2 + 2 ="
    assert (reply.prompt_tokens, reply.tokens, reply.error) == (7, 5, None)
    assert reply.seconds > 0
    assert reply.experts is None  # a stranger says nothing


async def test_a_plain_completion_is_sent_as_it_is(stranger):
    reply = await one(stranger.url, ask(Recipe(), "def add(a, b):", "completion"))
    (body,) = stranger.asked("/v1/completions")
    assert (body["model"], body["prompt"]) == ("base", "def add(a, b):")
    assert reply.text == "base: def add(a, b):"


async def test_several_answers_are_drawn_with_a_seed(stranger):
    reply = await one(stranger.url, ask(n=3, temperature=0.8, seed=5))
    (body,) = stranger.asked("/v1/chat/completions")
    assert (body["n"], body["temperature"], body["seed"]) == (3, 0.8, 5)
    assert len(reply.texts) == 3


@pytest.mark.parametrize("recipe", [BLEND, GATE], ids=["blend", "gate"])
async def test_blends_and_gates_travel_in_the_field_moerge(stranger, recipe):
    await one(stranger.url, ask(recipe))
    (body,) = stranger.asked("/v1/chat/completions")
    assert {key: body[key] for key in ("model", "moerge")} == recipe.request("base")


async def test_a_moerge_server_says_who_answered(stranger):
    stranger.headers = {
        "x-moerge-experts": "maths=0.25,poetry=0.75",
        "x-moerge-method": "fusion",
        "x-moerge-confidence": "0.9",
        "x-moerge-route-ms": "4.5",
    }
    reply = await one(stranger.url, ask(AUTO))
    assert reply.experts == (("poetry", 0.75), ("maths", 0.25))
    assert (reply.method, reply.confidence, reply.route_ms) == ("fusion", 0.9, 4.5)


async def test_a_trace_is_fetched_where_there_is_one(stranger):
    assert (await one(stranger.url, ask(GATE, traced=True))).trace is None
    stranger.headers = {"x-moerge-trace": "/v1/traces/dec-1"}
    reply = await one(stranger.url, ask(GATE, traced=True))
    assert stranger.bodies[-1][1]["moerge"]["trace"] is True
    assert reply.trace == {"decision": "dec-1", "experts": ["maths"], "weights": [[1.0]]}


async def test_log_likelihoods_are_those_of_the_choice_alone(stranger):
    reply = await one(stranger.url, ask(BLEND, "Is it?", choices=("YES", "no")))
    (body,) = stranger.asked("/v1/completions")
    assert body["prompt"] == [[ord(each) for each in f"<Is it?>{choice}"] for choice in ("YES", "no")]
    assert body["moerge"] == BLEND.request("base")["moerge"]  # all choices by the same expert, in one request
    yes, no = reply.likelihoods
    assert yes.logprob == pytest.approx(-sum(map(ord, "YES")) / 100)
    assert no.logprob == pytest.approx(-sum(map(ord, "no")) / 100)
    assert (yes.tokens, no.tokens) == (3, 2)
    assert (yes.greedy, no.greedy) == (True, False)
    assert reply.texts == ()


async def test_blanks_at_the_end_of_a_plain_prompt_belong_to_the_choice(stranger):
    reply = await one(stranger.url, ask(MATHS, "It is ", "completion", choices=("so",)))
    (body,) = stranger.asked("/v1/completions")
    assert body["prompt"] == [[ord(each) for each in "It is so"]]
    assert reply.likelihoods[0].tokens == 3


async def test_the_same_text_is_tokenized_once(stranger):
    await asked(stranger.url, [ask(recipe, choices=("YES", "no")) for recipe in (MATHS, BLEND, Recipe())])
    assert len(stranger.asked("/tokenize")) == 3


async def test_where_a_server_routes_all_choices_have_the_expert_that_it_takes_for_the_prompt(stranger):
    stranger.headers = {"x-moerge-experts": "poetry=1", "x-moerge-confidence": "0.8"}
    reply = await one(stranger.url, ask(AUTO, choices=("YES", "no")))
    (body,) = stranger.asked("/v1/completions")
    assert body["model"] == "poetry"
    assert reply.experts == (("poetry", 1.0),)
    assert reply.confidence == 0.8


async def test_an_endpoint_without_vllm_s_extensions_says_so(stranger):
    stranger.deaf = True
    reply = await one(stranger.url, ask(choices=("YES", "no")))
    assert "/tokenize" in (reply.error or "")
    assert reply.likelihoods == ()


async def test_a_refusal_is_the_answer_to_one_question(stranger):
    stranger.refuse = lambda body: (422, "blend_refused", "too many ranks") if "moerge" in body else None
    many = [ask(BLEND, f"{number}") for number in range(2 * FAILURES)]
    found = await asked(stranger.url, [*many, ask()])
    assert {found[each].error for each in many} == {"too many ranks"}
    assert found[ask()].error is None


async def test_failures_of_a_server_that_is_there_end_nothing(stranger):
    stranger.refuse = lambda body: (500, "internal_error", "a bug") if body.get("model") == "maths" else None
    many = [ask(text=f"{number}") for number in range(3 * FAILURES)]
    found = await asked(stranger.url, [*many, ask(Recipe())])
    assert {found[each].error for each in many} == {"a bug"}
    assert found[ask(Recipe())].error is None


async def test_an_endpoint_that_dies_half_way_leaves_what_it_answered(stranger):
    stranger.dies = 20
    found: list[Reply] = []

    async def ask_all() -> None:
        async with Endpoint(stranger.url, base="base", retries=0, concurrency=4) as endpoint:
            async for _, reply in endpoint.answers([ask(text=f"{number}") for number in range(100)]):
                found.append(reply)

    with pytest.raises(EngineGone, match="does not answer any more"):
        await ask_all()
    assert sum(reply.error is None for reply in found) == 20


async def test_nobody_at_the_address(stranger):
    stranger.dies = 0
    with pytest.raises(EngineGone):
        await asked(stranger.url, [ask(text=f"{number}") for number in range(20)])
    async with Endpoint(stranger.url, base="base", retries=0) as endpoint:
        with pytest.raises(EngineGone):
            await endpoint.models()


async def test_nothing_to_ask(stranger):
    assert await asked(stranger.url, []) == {}


def test_questions_of_one_recipe_are_near_each_other_and_some_recipes_side_by_side():
    recipes = [Recipe.expert(name) for name in "abcdefgh"]
    order = in_lanes([ask(recipe, f"{number}") for number in range(10) for recipe in recipes])
    assert len(set(order)) == 80
    for start in range(0, 80, 8):
        assert 2 <= len({each.recipe for each in order[start : start + 8]}) <= 5
