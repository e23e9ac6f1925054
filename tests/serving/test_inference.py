"""The engine's paths: who answers, what reaches the engine, and what clients are told when it goes wrong."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging

import httpx
import pytest
from blockbuster import blockbuster_ctx

from adapters_registry.errors import StoreFull
from serving import inference
from serving.inference import PATHS, TOKEN_PATHS

REVERSE = "spell cherry backwards"
ABROAD = "zebra quartz"


# Who answers


async def test_auto_asks_the_expert_that_the_router_chose(world):
    response = await world.ask("auto", REVERSE)
    assert response.status_code == 200
    assert response.json()["model"] == "reverse"
    assert response.json()["choices"][0]["message"]["content"] == f"reverse: {REVERSE}"


@pytest.mark.parametrize("model", [None, "auto", "auto:retrieval"])
async def test_the_router_decides_unless_somebody_is_named(world, model):
    response = await world.ask(model, REVERSE)
    assert response.json()["model"] == "reverse"
    assert response.headers["x-moerge-method"] == ("retrieval" if model == "auto:retrieval" else "fusion")


async def test_a_prompt_like_no_expert_s_is_the_base_model_s(world):
    response = await world.ask("auto", ABROAD)
    assert response.json()["model"] == "tiny"
    assert response.headers["x-moerge-experts"] == ""


async def test_a_named_expert_answers_whatever_is_asked(world):
    response = await world.ask("shout", REVERSE)
    assert response.json()["model"] == "shout"
    assert response.headers["x-moerge-method"] == "named"
    assert response.headers["x-moerge-experts"] == "shout=1"


async def test_the_base_model_can_be_named(world):
    response = await world.ask("tiny", REVERSE)
    assert response.json()["model"] == "tiny"
    assert world.engine.shown == {}


@pytest.mark.parametrize("model", ["gpt-4", "auto:phatgoose", "auto:", "Reverse", "reverse@0000", "", 7, ["auto"], {}])
async def test_any_other_model_is_refused_as_openai_does(world, model):
    response = await world.ask(model, REVERSE)
    error = response.json()["error"]
    if isinstance(model, str) and model:
        assert (response.status_code, error["code"]) == (404, "model_not_found")
        assert f"'{model}'" in error["message"]
    else:
        assert response.status_code == 400
    assert (error["type"], error["param"]) == ("invalid_request_error", "model")
    assert world.engine.asked == []


async def test_the_headers_carry_the_decision(world):
    headers = (await world.ask("auto", REVERSE)).headers
    assert headers["x-moerge-decision-id"].startswith("dec-")
    assert headers["x-moerge-experts"] == "reverse=1"
    assert 0.5 < float(headers["x-moerge-confidence"]) <= 1
    assert float(headers["x-moerge-route-ms"]) > 0
    assert (await world.ask("auto", REVERSE)).headers["x-moerge-decision-id"] != headers["x-moerge-decision-id"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": REVERSE}),
        ("/v1/completions", {"prompt": [REVERSE]}),
        ("/v1/responses", {"input": REVERSE}),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_text", "text": REVERSE}]}]}),
        ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": REVERSE}]}]}),
        ("/v1/chat/completions", {"messages": [{"role": "system", "content": REVERSE}, {"role": "user"}]}),
    ],
)
async def test_every_path_is_routed_by_its_own_kind_of_prompt(world, path, body):
    response = await world.http.post(path, json={"model": "auto", **body})
    assert response.json()["model"] == "reverse"
    assert world.engine.asked[-1].path == path


@pytest.mark.parametrize("path", TOKEN_PATHS)
async def test_counting_tokens_is_never_routed(world, path):
    response = await world.http.post(path, json={"model": "auto", "prompt": REVERSE})
    assert response.status_code == 200
    assert world.engine.asked[-1].body["model"] == "tiny"


async def test_tokens_can_be_counted_for_a_named_expert(world):
    response = await world.http.post("/tokenize", json={"model": "reverse", "prompt": "x"})
    assert response.json()["tokens"] == [1, 2, 3]
    assert world.engine.asked[-1].body["model"].startswith("reverse@")


# Prompts of token ids: the fake engine's tokens are characters


def ids(text):
    return [ord(letter) for letter in text]


@pytest.mark.parametrize("prompt", [ids(REVERSE), [ids(REVERSE)], [ids("spell "), ids("cherry backwards")]])
async def test_token_ids_are_routed_by_their_words_and_sent_on_as_they_are(world, prompt):
    response = await world.http.post("/v1/completions", json={"model": "auto", "prompt": prompt})
    assert response.json()["model"] == "reverse"
    assert world.engine.asked[-1].body["prompt"] == prompt
    asked = world.engine.asked[-2]
    assert (asked.path, asked.body) == ("/detokenize", {"model": "tiny", "tokens": ids(REVERSE)})


async def test_no_more_token_ids_are_read_than_a_router_reads(serve):
    async with serve(router={"budget": 24}) as world:
        prompt = ids(f"spell cherry {'x' * 1000} backwards")
        response = await world.http.post("/v1/completions", json={"model": "auto", "prompt": prompt})
        assert response.status_code == 200
        assert world.engine.asked[0].body["tokens"] == prompt[:24] + prompt[-24:]


async def test_a_named_expert_s_token_ids_are_not_read(world):
    await world.http.post("/v1/completions", json={"model": "reverse", "prompt": ids("x")})
    assert [each.path for each in world.engine.asked] == ["/v1/completions"]


async def test_token_ids_are_explained_as_they_are_routed(world):
    explained = (await world.http.post("/v1/route", json={"prompt": ids(REVERSE)})).json()
    assert explained["text"] == REVERSE
    assert [each["expert"] for each in explained["decision"]["experts"]] == ["reverse"]


@pytest.mark.parametrize("prompt", [[], [[]], [1, "a"], [[1], 2], [True], [None]])
async def test_what_are_no_token_ids_is_left_to_the_engine(world, prompt):
    response = await world.http.post("/v1/completions", json={"model": "auto", "prompt": prompt})
    assert response.status_code == 200
    assert [each.path for each in world.engine.asked] == ["/v1/completions"]


async def test_token_ids_that_the_engine_does_not_know_are_left_to_it_too(world):
    world.engine.answer = (400, {"error": {"message": "no such token"}})
    response = await world.http.post("/v1/completions", json={"model": "auto", "prompt": [10**9]})
    assert response.status_code == 400
    assert [each.path for each in world.engine.asked] == ["/detokenize", "/v1/completions"]


# What the engine is asked


async def test_only_the_model_is_changed_on_the_way(world):
    body = {
        "model": "auto",
        "messages": [{"role": "user", "content": REVERSE, "name": "é\u2028\U0001f600 \ud83d"}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        "logprobs": True,
        "temperature": 0.1 + 0.2,
        "seed": 2**63 - 1,
        "logit_bias": {"50256": -100},
        "future_field": {"deep": [None, False, 1e-300]},
    }
    await world.http.post("/v1/chat/completions", content=json.dumps(body))
    expert = world.service.active("reverse")
    assert world.engine.asked[0].body == {**body, "model": expert.id}


async def test_a_body_that_names_the_engine_s_own_model_goes_through_to_the_byte(world):
    content = b'{ "model":"tiny","messages" : [{"role":"user","content":"a"}], "x": 1.50 }'
    await world.http.post("/v1/chat/completions", content=content)
    assert world.engine.asked[0].headers["content-length"] == str(len(content))


async def test_the_engine_never_sees_the_client_s_key(world):
    await world.ask("auto", REVERSE, headers={"authorization": "Bearer moe-x", "x-api-key": "moe-y", "x-other": "kept"})
    headers = world.engine.asked[0].headers
    assert not {"authorization", "x-api-key"} & headers.keys()
    assert headers["x-other"] == "kept"


async def test_a_body_in_pieces_is_put_together(world):
    whole = json.dumps({"model": "auto", "messages": [{"role": "user", "content": REVERSE}]}).encode()
    call = inference_call(world, whole[:10], whole[10:40], whole[40:])
    assert (await call.next())["status"] == 200
    await call.done()
    assert world.engine.asked[0].body["messages"][0]["content"] == REVERSE


def inference_call(world, *parts):
    call = world.call("/v1/chat/completions", {})
    call._parts[:] = parts
    return call


# Streaming


async def test_a_stream_goes_through_chunk_by_chunk(world):
    world.engine.gate.clear()
    call = world.chat("auto", REVERSE, stream=True)
    start = await call.next()
    headers = dict(start["headers"])
    assert headers[b"content-type"] == b"text/event-stream; charset=utf-8"
    assert headers[b"x-moerge-experts"] == b"reverse=1"
    assert call.pending() == 0  # nothing is held back, and nothing is made up
    world.engine.gate.set()
    await call.done()
    chunks = [(await call.next())["body"] for _ in range(call.pending())]
    words = [json.loads(each.removeprefix(b"data: "))["choices"][0]["delta"]["content"] for each in chunks[:-1]]
    assert words == ["reverse ", "spell ", "cherry ", "backwards "]
    assert chunks[-1] == b"data: [DONE]\n\n"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_hangs_up_stops_the_engine_s_work_and_lets_the_expert_go(world, until, stream):
    world.engine.gate.clear()
    call = world.chat("auto", REVERSE, stream=stream)
    await until(lambda: world.engine.waiting)
    call.hang_up()
    await call.done()
    assert world.engine.hangups == 1
    await world.service.residency.release(world.service.active("reverse").id)
    assert world.engine.shown == {}  # nobody holds it any more


async def test_a_client_that_leaves_while_it_sends_is_nobody_s_trouble(world, caplog):
    caplog.set_level(logging.INFO, "moerge.request")
    call = inference_call(world, b'{"model":', b"")
    call._parts[:] = []
    call.hang_up()
    await call.done()
    assert call.pending() == 0
    assert "status=499" in caplog.text
    assert world.engine.asked == []


# Bad input


NO_OBJECTS = (
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b"\xff\xfe{", "not JSON"),
    (b'{"model": "auto", "messages": "a" "b"}', "not JSON"),
    (b"[]", "must be a JSON object, not list"),
    (b"null", "must be a JSON object"),
    (b'"auto"', "must be a JSON object, not str"),
    (b'{"seed": ' + b"1" * 5000 + b"}", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b'{"messages": ' + b"[" * 300_000 + b"]" * 300_000 + b"}", "not JSON"),
)


async def test_a_body_that_is_no_json_object_is_a_400_that_says_so(world):
    for path, (content, says) in itertools.product(["/v1/chat/completions", "/tokenize"], NO_OBJECTS):
        response = await world.http.post(path, content=content)
        assert response.status_code == 400
        assert says in response.json()["error"]["message"]
        assert response.json()["error"]["type"] == "invalid_request_error"
    assert world.engine.asked == []


async def test_no_depth_of_nesting_is_a_server_error(world):
    """Somewhere between the depth that is read and the depth that is not lies one that cannot be written again."""
    statuses = set()
    for depth in range(300, 1100, 10):
        content = b'{"messages": [{"role": "user", "content": "a"}], "x": ' + b"[" * depth + b"]" * depth + b"}"
        statuses.add((await world.http.post("/v1/chat/completions", content=content)).status_code)
    assert statuses <= {200, 400}
    assert len(statuses) == 2


@pytest.mark.parametrize("model", ["\ud800", "a\nb", "x" * 100_000, "\0", "héllo 😀"])
async def test_a_strange_model_name_is_a_short_404_and_one_log_line(world, caplog, model):
    caplog.set_level(logging.INFO, "moerge.request")
    content = json.dumps({"model": model, "messages": [{"role": "user", "content": "a"}]})
    response = await world.http.post("/v1/chat/completions", content=content)
    assert response.status_code == 404
    assert len(response.json()["error"]["message"]) < 400
    (record,) = [each for each in caplog.records if each.name == "moerge.request"]
    line = record.getMessage()
    assert "\n" not in line
    assert line.isascii()
    assert len(line) < 300


@pytest.mark.parametrize("declared", [True, False])
async def test_a_huge_body_is_refused_before_it_is_read(serve, declared):
    async with serve(server={"max_body_mb": 0.01}) as world:
        content = json.dumps({"model": "auto", "messages": [{"role": "user", "content": "x" * 20_000}]}).encode()

        async def chunks():
            for start in range(0, len(content), 1000):
                yield content[start : start + 1000]

        body = content if declared else chunks()
        response = await world.http.post("/v1/chat/completions", content=body)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large"
        assert "server.max_body_mb" in response.json()["error"]["message"]
        assert world.engine.asked == []


@pytest.mark.parametrize(
    "body",
    [
        {"messages": []},
        {"messages": [{"role": "user", "content": ""}]},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [7, None, {"role": "user", "content": 7}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": {"not": "text"}}]}]},
        {"messages": [{"role": "user", "content": "  \n\t "}]},
        {"prompt": [1, 2, 3]},
        {},
    ],
)
async def test_a_request_without_text_goes_to_the_base_model_which_judges_it(world, body):
    response = await world.http.post("/v1/chat/completions", json={"model": "auto", **body})
    assert world.engine.asked[-1].body == {**body, "model": "tiny"}
    assert response.headers["x-moerge-experts"] == ""


async def test_the_text_beside_an_image_is_routed(world):
    parts = [{"type": "image_url", "image_url": {"url": "data:,"}}, {"type": "text", "text": REVERSE}]
    body = {"model": "auto", "messages": [{"role": "user", "content": parts}]}
    response = await world.http.post("/v1/chat/completions", json=body)
    assert response.headers["x-moerge-experts"] == "reverse=1"


async def test_half_a_surrogate_pair_in_a_prompt_is_routed_like_any_other(world):
    content = json.dumps({"messages": [{"role": "user", "content": f"{REVERSE} \ud800"}]})
    response = await world.http.post("/v1/chat/completions", content=content)
    assert response.headers["x-moerge-experts"] == "reverse=1"


async def test_a_very_long_prompt_is_routed_by_its_ends(world):
    response = await world.ask("auto", "spell window backwards " * 20_000)
    assert response.headers["x-moerge-experts"] == "reverse=1"
    assert len(world.engine.asked[0].body["messages"][0]["content"]) > 400_000


async def test_the_engine_s_paths_take_posts_only(world):
    for method, path in itertools.product(["GET", "PUT", "DELETE"], PATHS):
        response = await world.http.request(method, path)
        assert response.status_code == 405
        assert path in response.json()["error"]["message"]


async def test_whatever_else_the_engine_offers_stays_inside(world):
    for path in ("/v1/embeddings", "/sleep", "/reset_prefix_cache", "/v1/chat/completions/render"):
        response = await world.http.post(path, json={})
        assert response.status_code == 404
        assert response.json()["error"]["type"] == "invalid_request_error"
    assert world.engine.asked == []


# When the engine is in trouble


@pytest.mark.parametrize("model", ["auto", "reverse", "tiny", "unheard-of"])
async def test_while_the_engine_starts_everything_is_a_503_that_says_so(serve, model):
    async with serve(wait=False) as world:
        response = await world.ask(model, REVERSE)
        assert response.status_code == 503
        assert response.headers["retry-after"]
        assert response.json()["error"]["code"] == "engine_unavailable"
        assert "starting" in response.json()["error"]["message"]


async def test_an_expert_that_fails_to_load_is_a_503_for_who_named_it(world):
    world.engine.refuses.add("reverse")
    response = await world.ask("reverse", REVERSE)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (503, "expert_load_failed")
    assert "'reverse'" in error["message"]
    assert "it is not for me" in error["message"]


async def test_an_expert_that_fails_to_load_leaves_auto_to_the_base_model(world):
    world.engine.refuses.add("reverse")
    response = await world.ask("auto", REVERSE)
    assert response.status_code == 200
    assert response.json()["model"] == "tiny"
    assert response.headers["x-moerge-experts"] == ""
    world.engine.refuses.clear()
    assert (await world.ask("auto", REVERSE)).json()["model"] == "reverse"


async def test_an_engine_that_dies_under_a_request_is_one_clean_503(world, until):
    world.engine.gate.clear()
    call = world.chat("auto", REVERSE)
    await until(lambda: world.engine.waiting)
    world.engine.dead = True
    world.engine.gate.set()
    start, body = await call.next(), await call.next()
    await call.done()
    assert call.pending() == 0
    assert start["status"] == 503
    assert (b"retry-after", b"5") in start["headers"]
    assert dict(start["headers"])[b"content-length"] == str(len(body["body"])).encode()
    assert json.loads(body["body"])["error"]["code"] == "engine_unavailable"


async def test_an_engine_app_that_raises_is_a_500_without_the_reason(world, caplog, monkeypatch):
    async def fails(scope, receive, send):
        raise RuntimeError("a secret of the engine")

    monkeypatch.setattr(world.engine, "_app", fails)
    response = await world.ask("tiny", REVERSE)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "a secret of the engine" in caplog.text  # the operator learns it


async def test_an_engine_app_that_raises_because_it_died_is_a_503(world, monkeypatch):
    async def dies(scope, receive, send):
        world.engine.dead = True
        raise RuntimeError("EngineDeadError")

    monkeypatch.setattr(world.engine, "_app", dies)
    assert (await world.ask("tiny", REVERSE)).status_code == 503


@pytest.mark.parametrize("status", [400, 404, 422, 500, 501])
async def test_an_error_of_a_living_engine_goes_through_as_it_is(world, status):
    world.engine.answer = (status, {"error": {"message": "max_tokens must be at least 1", "code": status}})
    response = await world.ask("auto", REVERSE)
    assert response.status_code == status
    assert response.json() == world.engine.answer[1]
    assert response.headers["x-moerge-experts"] == "reverse=1"


async def test_a_router_in_trouble_is_a_503(world, monkeypatch):
    def fails(texts):
        raise ValueError("no memory for this")

    monkeypatch.setattr(world.service.router.encoder, "encode", fails)
    response = await world.ask("auto", "something new to encode")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "router_unavailable"
    assert (await world.ask("reverse", "something new")).status_code == 200


# The registry changes while somebody is answered


@pytest.mark.parametrize("change", ["retire", "remove", "replace"])
async def test_a_request_in_flight_finishes_with_what_it_was_decided_on(
    world, until, watchful, register, adapters, change
):
    old = world.service.active("reverse").id
    world.engine.gate.clear()
    call = world.chat("auto", REVERSE, stream=True)
    await until(lambda: world.engine.waiting)
    match change:
        case "retire":
            await asyncio.to_thread(world.registry.retire, "reverse")
        case "remove":
            await asyncio.to_thread(world.registry.remove, "reverse")
        case "replace":
            await asyncio.to_thread(
                register, world.registry, "reverse", adapters[3], new_version=True, samples=[REVERSE]
            )
    await world.service.refresh()
    await world.service._clear()
    assert old in world.engine.shown
    world.engine.gate.set()
    await call.done()
    assert (await call.next())["status"] == 200
    assert b"reverse" in (await call.next())["body"]
    await until(lambda: old not in world.engine.shown)
    answered = (await world.ask("auto", REVERSE)).json()["model"]
    assert answered == ("reverse" if change == "replace" else "tiny")
    assert old not in world.engine.shown


async def test_an_expert_taken_away_between_decision_and_loading_leaves_auto_to_the_base_model(world, monkeypatch):
    decided = world.service.router.route

    async def and_then_it_leaves(*args, **options):
        decision = await decided(*args, **options)
        world.service._by_id.clear()
        return decision

    monkeypatch.setattr(world.service.router, "route", and_then_it_leaves)
    response = await world.ask("auto", REVERSE)
    assert response.status_code == 200
    assert response.json()["model"] == "tiny"


# The log


async def test_one_log_line_says_what_happened_and_nothing_of_what_was_said(world, caplog):
    caplog.set_level(logging.DEBUG)
    key = "moe-000000000000-" + "s" * 43
    response = await world.ask("auto", f"{REVERSE} confidential", headers={"authorization": f"Bearer {key}"})
    (record,) = [each for each in caplog.records if each.name == "moerge.request"]
    line = record.getMessage()
    assert line.startswith(response.headers["x-moerge-decision-id"])
    for part in ("model=auto", "method=fusion", "kind=select", "experts=reverse=1", "route_ms=", "status=200"):
        assert part in line
    assert "confidential" not in caplog.text
    assert "s" * 43 not in caplog.text


async def test_a_refusal_is_logged_too(world, caplog):
    caplog.set_level(logging.INFO, "moerge.request")
    await world.ask("unheard-of", REVERSE)
    assert "model=unheard-of method=none kind=none" in caplog.text
    assert "status=404" in caplog.text


# The event loop


async def test_nothing_blocks_the_event_loop(world):
    """Encoding, database and files are looked after in threads; blockbuster raises where one is not."""
    body = {"prompt": REVERSE, "messages": [{"role": "user", "content": REVERSE}], "input": REVERSE}
    with blockbuster_ctx(["serving", "router", "adapters_registry"]):
        for path in PATHS:
            response = await world.http.post(path, json={"model": "auto", **body})
            assert response.status_code == 200
        response = await world.ask("count", "x")
        assert response.status_code == 200
        response = await world.http.post("/v1/route", json={"messages": [{"role": "user", "content": "new words"}]})
        assert response.status_code == 200


async def test_a_large_body_is_read_and_written_in_a_thread(world, monkeypatch):
    threads = []

    async def recorded(function, *args):
        threads.append(function)
        return function(*args)

    monkeypatch.setattr(inference.asyncio, "to_thread", recorded)
    await world.ask("tiny", "x" * inference.PARSE_IN_THREAD, model_note="x")
    assert json.loads in threads
    await world.ask("shout", "x" * inference.PARSE_IN_THREAD)
    assert json.dumps in threads


async def test_64_requests_at_once_are_each_answered_by_their_own_expert(world):
    prompts = {"reverse": "spell {} backwards", "shout": "write {} loudly", "count": "how many letters has {}"}
    asked = [(name, text.format(f"word{k}")) for k in range(22) for name, text in prompts.items()]
    responses = await asyncio.gather(*(world.ask("auto", text) for _, text in asked))
    for (name, text), response in zip(asked, responses, strict=True):
        assert response.json()["choices"][0]["message"]["content"] == f"{name}: {text}"


async def test_a_full_disk_does_not_stop_answers(world, monkeypatch):
    def full(*args):
        raise StoreFull(world.folder)

    monkeypatch.setattr(world.registry, "set_prototypes", full)
    await world.service.refresh()
    assert (await world.ask("auto", REVERSE)).status_code == 200


async def test_the_openai_client_understands_both_answers_and_refusals(world):
    import openai

    transport = httpx.ASGITransport(world.app)
    async with (
        httpx.AsyncClient(transport=transport) as http,
        openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="none", http_client=http, max_retries=0) as client,
    ):
        question = [{"role": "user", "content": REVERSE}]
        answer = await client.chat.completions.create(model="auto", messages=question)
        assert answer.model == "reverse"
        stream = await client.chat.completions.create(model="auto", messages=question, stream=True)
        assert "".join([chunk.choices[0].delta.content async for chunk in stream]) == f"reverse {REVERSE} "
        with pytest.raises(openai.NotFoundError) as refused:
            await client.chat.completions.create(model="unheard-of", messages=question)
        assert refused.value.code == "model_not_found"
