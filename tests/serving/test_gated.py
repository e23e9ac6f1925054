"""Gates through the whole server, without vLLM: what the engine is asked, and what is answered when it cannot be."""

from __future__ import annotations

import asyncio
import json
import math

import pytest
from blockbuster import blockbuster_ctx

from adapters_registry.expert import State
from router.gating import GATES
from router.methods import SERVED
from serving.inference import PATHS
from serving.recipes import layout_of

REVERSE = "spell cherry backwards"
FAR = "zebra quartz"
GATED = [name for name in SERVED if name in GATES]
ALL = ["count", "reverse", "shout"]


def experts_of(response):
    pairs = [each.partition("=") for each in response.headers["x-moerge-experts"].split(",") if each]
    return {name: float(weight) for name, _, weight in pairs}


def arguments(world):
    return world.engine.asked[-1].body.get("vllm_xargs")


def composites(world):
    return [each for each in (world.folder / "built").iterdir() if not each.name.startswith(".")]


# Decisions of the router


@pytest.mark.parametrize("gate", [each for each in GATED if each != "probe"])
async def test_a_gate_answers_with_the_shortlist_s_composite(world, gate):
    response = await world.ask(f"auto:{gate}", REVERSE)
    assert response.json()["model"] == f"auto:{gate}"
    assert response.headers["x-moerge-method"] == gate
    assert list(experts_of(response)) == ALL
    sent = world.engine.asked[-1].body
    layout = await asyncio.to_thread(layout_of, world.engine.paths[sent["model"]])
    assert (layout.gate, [each.id.partition("@")[0] for each in layout.members]) == (gate, ALL)
    assert sent["messages"][0]["content"] == REVERSE
    weights = (arguments(world) or {}).get("moerge_weights")
    assert (weights is not None) == (gate in ("constant", "evidence"))


async def test_far_from_every_expert_the_base_model_answers(world):
    response = await world.ask("auto:arrow", FAR)
    assert response.json()["model"] == "tiny"
    assert "vllm_xargs" not in world.engine.asked[-1].body


async def test_a_mixture_s_weights_travel_with_the_request_and_its_composite_is_shared(world):
    first = await world.ask("auto:constant", REVERSE)
    weights = arguments(world)["moerge_weights"]
    assert weights == pytest.approx(list(experts_of(first).values()), abs=1e-3)
    assert math.fsum(weights) == pytest.approx(1)
    assert max(weights) == weights[1]
    await world.ask("auto:constant", "write cherry loudly")
    assert arguments(world)["moerge_weights"] != weights
    assert len({each.body["model"] for each in world.engine.asked}) == 1


async def test_what_the_client_tells_the_engine_stays_beside_our_own(world):
    await world.ask("auto:constant", REVERSE, vllm_xargs={"session_id": "x"})
    assert arguments(world).keys() == {"session_id", "moerge_weights"}


async def test_a_shortlist_is_cut_to_the_engine_s_rank(serve):
    async with serve(engine={"max_rank": 8}) as world:  # experts of rank 4
        response = await world.ask("auto:arrow", REVERSE)
        assert len(experts_of(response)) == 2
        explained = (await world.http.post("/v1/route", json={"model": "auto:arrow", "prompt": REVERSE})).json()
        assert explained["decision"]["reason"] == "2 of 3 experts fit a composite of 8 rows"


async def test_when_the_engine_refuses_a_composite_the_base_model_answers(world, caplog):
    world.engine.refuses.add("auto:arrow")
    response = await world.ask("auto:arrow", REVERSE)
    assert response.json()["model"] == "tiny"
    assert response.headers["x-moerge-experts"] == ""
    assert "The base model answers instead." in caplog.text
    assert (await world.ask("auto:spectr", REVERSE)).json()["model"] == "auto:spectr"


async def test_when_a_composite_cannot_be_built_the_base_model_answers(serve, caplog):
    methods = {"retrieval": {}, "phatgoose": {}}
    async with serve(router={"methods": methods}) as world:
        assert (await world.ask("auto:phatgoose", REVERSE)).json()["model"] == "tiny"
        assert "moerge gates train count" in caplog.text


async def test_gates_work_on_every_path_and_never_block_the_event_loop(world):
    body = {"prompt": REVERSE, "messages": [{"role": "user", "content": REVERSE}], "input": REVERSE}
    with blockbuster_ctx(["serving", "router", "adapters_registry"]):
        for path in PATHS:
            for gate in ("arrow", "constant", "evidence", "probe"):
                response = await world.http.post(path, json={"model": f"auto:{gate}", **body})
                assert response.status_code == 200
                assert response.headers["x-moerge-experts"]
        traced = await world.ask("auto:arrow", REVERSE, moerge={"trace": True})
        assert (await world.http.get(traced.headers["x-moerge-trace"])).status_code == 200
        await world.service._clear()


async def test_64_requests_at_once_build_each_composite_once(world):
    gates = ["arrow", "spectr", "constant", "evidence"]
    responses = await asyncio.gather(*(world.ask(f"auto:{gates[k % 4]}", f"{REVERSE} {k}") for k in range(64)))
    assert {each.status_code for each in responses} == {200}
    assert {each.json()["model"] for each in responses} == {f"auto:{gate}" for gate in gates}
    gated = [await asyncio.to_thread(layout_of, each) for each in composites(world)]
    assert sorted(each.gate for each in gated) == sorted([*gates, "probe"])  # the probe was for calibration


# Experts come and go


async def test_a_member_that_retires_while_its_composite_answers(watchful, world, until):
    world.engine.gate.clear()
    call = world.chat("auto:arrow", REVERSE)
    await until(lambda: world.engine.waiting)
    name = world.engine.asked[-1].body["model"]
    await asyncio.to_thread(world.registry.retire, "shout")
    await until(lambda: not any(each.startswith("shout@") for each in world.service._by_id))
    await world.service._clear()
    assert name in world.engine.shown
    assert len(composites(world)) == 1
    world.engine.gate.set()
    await call.done()
    assert (await call.next())["status"] == 200
    await until(lambda: name not in world.engine.shown)
    await until(lambda: composites(world) == [])
    assert list(experts_of(await world.ask("auto:arrow", REVERSE))) == ["count", "reverse"]


async def test_a_restarted_engine_gets_its_composites_again(watchful, world, until):
    await world.ask("auto:arrow", REVERSE)
    world.engine.dead = True
    await until(lambda: world.engine.starts == 2 and world.service.failure is None)
    assert (await world.ask("auto:arrow", REVERSE)).json()["model"] == "auto:arrow"


async def test_an_expert_with_nothing_but_weights_is_on_the_shortlist(world, register, adapters):
    await asyncio.to_thread(register, world.registry, "unheard", adapters[3], State.ACTIVE)
    await world.service.refresh()
    for prompt in (REVERSE, FAR):
        assert "unheard" in experts_of(await world.ask("auto:arrow", prompt))
    assert (await world.ask("auto", FAR)).json()["model"] == "tiny"


# Probes


async def test_a_probe_reads_one_token_and_the_likeliest_expert_answers(serve):
    async with serve(router={"methods": {"retrieval": {}, "probe": {"prior": False}}}) as world:
        world.engine.evidence = {"shout": 30.0, "reverse": 3.0}
        response = await world.ask(
            "auto:probe", REVERSE, temperature=0.7, stream=False, n=2, max_tokens=9, tool_choice="auto"
        )
        assert response.json()["model"] == "shout"
        assert experts_of(response) == {"shout": 1.0}
        reading, answering = world.engine.asked[-2:]
        assert reading.body["max_tokens"] == 1
        assert not {"n", "stream", "tool_choice"} & reading.body.keys()
        assert reading.body["messages"] == answering.body["messages"]
        assert answering.body["max_tokens"] == 9
        assert "vllm_xargs" not in answering.body
        assert float(response.headers["x-moerge-confidence"]) == pytest.approx(
            1 / (1 + math.exp(0.002 * (3 - 30)) + math.exp(0.002 * -30)), abs=1e-4
        )


async def test_a_streamed_request_is_probed_without_streaming(world):
    world.engine.evidence = {"count": 30_000.0}
    call = world.chat("auto:probe", REVERSE, stream=True, stream_options={"include_usage": True})
    await call.done()
    assert not {"stream", "stream_options"} & world.engine.asked[-2].body.keys()
    assert world.engine.asked[-1].body["stream"] is True
    assert world.engine.asked[-1].body["model"].startswith("count@")


async def test_a_blending_probe_mixes_by_probability(serve):
    methods = {"retrieval": {}, "probe": {"blend": True, "beta": 1.0, "prior": False}}
    async with serve(router={"methods": methods}) as world:
        world.engine.evidence = {"shout": math.log(3.0), "reverse": 0.0, "count": 0.0}
        response = await world.ask("auto:probe", REVERSE)
        assert response.json()["model"] == "auto:constant"
        assert arguments(world)["moerge_weights"] == pytest.approx([0.2, 0.2, 0.6])


async def test_a_prior_counts_beside_the_evidence(serve):
    methods = {"retrieval": {}, "probe": {}, "evidence": {}}
    async with serve(router={"methods": methods}) as world:
        assert experts_of(await world.ask("auto:probe", REVERSE)) == {"reverse": 1.0}
        world.engine.evidence = {"shout": 10_000.0}
        assert experts_of(await world.ask("auto:probe", REVERSE)) == {"shout": 1.0}
        await world.ask("auto:evidence", REVERSE)
        assert max(arguments(world)["moerge_weights"]) == arguments(world)["moerge_weights"][1]


async def test_when_the_prompt_cannot_be_read_alone_retrieval_decides(world, monkeypatch):
    world.engine.evidence = {"shout": math.nan}
    response = await world.ask("auto:probe", REVERSE)
    assert experts_of(response) == {"reverse": 1.0}

    async def nothing(key):
        return None

    monkeypatch.setattr(world.engine, "trace", nothing)
    assert experts_of(await world.ask("auto:probe", REVERSE)) == {"reverse": 1.0}


async def test_what_is_wrong_with_a_probed_request_is_the_engine_s_to_say(world):
    await world.ask("auto:probe", REVERSE)
    world.engine.answer = (400, {"error": {"message": "too long"}})
    response = await world.ask("auto:probe", REVERSE)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "too long"


async def test_a_probe_s_evidence_can_be_traced(world):
    world.engine.evidence = {"shout": 30_000.0}
    response = await world.ask("auto:probe", REVERSE, moerge={"trace": True})
    trace = (await world.http.get(response.headers["x-moerge-trace"])).json()
    assert (trace["gate"], trace["evidence"]) == ("probe", [0.0, 0.0, 30_000.0])
    assert trace["decision"]["experts"][0]["expert"] == "shout"


# The field `moerge`


async def test_experts_and_weights_can_be_named(world):
    response = await world.ask("auto", FAR, moerge={"experts": {"shout": -0.5, "count": 2}})
    assert response.headers["x-moerge-method"] == "named"
    assert experts_of(response) == {"count": 2.0, "shout": -0.5}
    assert arguments(world) == {"moerge_weights": [2.0, -0.5]}
    assert "moerge" not in world.engine.asked[-1].body


async def test_without_weights_they_count_the_same(world):
    response = await world.ask(None, FAR, moerge={"experts": ["shout", "count"]})
    assert experts_of(response) == {"count": 0.5, "shout": 0.5}
    assert arguments(world) is None
    await world.ask(None, FAR, moerge={"experts": {"shout": 1, "count": 1}})
    assert arguments(world) == {"moerge_weights": [1.0, 1.0]}


async def test_a_gate_can_be_chosen_with_its_settings(world):
    moerge = {"experts": ["shout", "count"], "gate": "arrow", "settings": {"top_k": 1}}
    response = await world.ask("auto", FAR, moerge=moerge)
    assert response.json()["model"] == "auto:arrow"
    layout = await asyncio.to_thread(layout_of, world.engine.paths[world.engine.asked[-1].body["model"]])
    assert layout.settings["top_k"] == 1


async def test_a_gate_without_experts_takes_the_router_s_shortlist(world):
    response = await world.ask("auto", REVERSE, moerge={"gate": "spectr", "settings": {"top_k": 2}})
    assert response.headers["x-moerge-method"] == "spectr"
    assert list(experts_of(response)) == ALL
    layout = await asyncio.to_thread(layout_of, world.engine.paths[world.engine.asked[-1].body["model"]])
    assert layout.settings["top_k"] == 2


async def test_a_prior_over_named_experts(world):
    moerge = {"experts": {"shout": 3, "count": 1}, "gate": "evidence"}
    assert experts_of(await world.ask("auto", FAR, moerge=moerge)) == {"count": 0.25, "shout": 0.75}
    assert arguments(world)["moerge_weights"] == [0.25, 0.75]
    moerge["gate"] = "probe"
    assert experts_of(await world.ask("auto", FAR, moerge=moerge)) == {"shout": 1.0}


async def test_experts_can_be_prepared(world):
    moerge = {"experts": ["count", "reverse"], "gate": "arrow"}
    names = set()
    for more in ({}, {"compress": 2}, {"general": "shout"}, {"compress": 3, "general": "shout"}):
        response = await world.ask("auto", FAR, moerge={**moerge, **more})
        assert response.json()["model"] == "auto:arrow"
        names.add(world.engine.asked[-1].body["model"])
        layout = await asyncio.to_thread(layout_of, world.engine.paths[world.engine.asked[-1].body["model"]])
        assert layout.blocks == (more.get("compress", 8 if "general" in more else 4),) * 2
    assert len(names) == 4


async def test_what_does_not_fit_says_how_it_would_and_does(serve):
    async with serve(engine={"max_rank": 8}) as world:
        moerge = {"experts": ["count", "reverse", "shout"]}
        refused = await world.ask("auto", FAR, moerge=moerge)
        assert refused.status_code == 422
        assert "compress=2" in refused.json()["error"]["message"]
        assert (await world.ask("auto", FAR, moerge={**moerge, "compress": 2})).status_code == 200


async def test_methods_can_prepare_their_experts(serve):
    settings = {"compress": 2, "general": "shout"}
    async with serve(engine={"max_rank": 8}, router={"methods": {"retrieval": {}, "arrow": settings}}) as world:
        response = await world.ask("auto:arrow", REVERSE)
        assert list(experts_of(response)) == ["count", "reverse"]
        layout = await asyncio.to_thread(layout_of, world.engine.paths[world.engine.asked[-1].body["model"]])
        assert layout.blocks == (2, 2)


async def test_one_named_expert_answers_alone(world):
    for experts in (["shout"], {"shout": 1}):
        assert (await world.ask("auto", FAR, moerge={"experts": experts})).json()["model"] == "shout"


REFUSED = [
    ({"experts": []}, 400, "1 to 64"),
    ({"experts": [f"e{k}" for k in range(65)]}, 400, "1 to 64"),
    ({"experts": ["shout", "shout"]}, 400, "twice"),
    ({"experts": "shout"}, 400, "experts"),
    ({"experts": [["shout"]]}, 400, "experts"),
    ({"experts": {"shout": "much", "count": 1}}, 400, "experts.shout"),
    ({"experts": {"shout": math.nan, "count": 1}}, 400, "finite"),
    ({"experts": {"shout": -1e9, "count": 1}}, 400, "at most 1000"),
    ({"experts": {"shout": None, "count": 1}}, 400, "a weight, or none"),
    ({"experts": {"shout": 1, "count": 1}, "gate": "arrow"}, 400, "weights itself"),
    ({"experts": {"shout": 1, "count": 0}, "gate": "evidence"}, 400, "above 0"),
    ({"experts": ["shout", "nobody"]}, 404, "nobody"),
    ({"experts": {"shout": 0.5}}, 422, "at least two"),
    ({"gate": "nonsense"}, 400, "nonsense"),
    ({"gate": "phatgoose"}, 404, "auto:phatgoose"),
    ({"gate": "arrow", "settings": {"top_k": 0}}, 400, "top_k"),
    ({"gate": "arrow", "settings": {"froce": 0}}, 400, "froce"),
    ({"settings": {"top_k": 1}}, 400, "gate"),
    ({"gate": "arrow", "compress": 2}, 400, "name them"),
    ({"experts": ["shout", "count"], "compress": 0}, 400, "compress"),
    ({"experts": ["shout", "count"], "general": "nobody"}, 404, "nobody"),
    ({"experts": ["shout", "count"], "general": "shout"}, 400, "itself"),
    ({"trace": "sometimes"}, 400, "trace"),
    ({"froce": 1}, 400, "froce"),
    ([], 400, "moerge"),
    (None, 400, "moerge"),
    ("yes", 400, "moerge"),
]


@pytest.mark.parametrize(("moerge", "status", "says"), REFUSED)
async def test_nonsense_is_refused_and_never_reaches_the_engine(world, moerge, status, says):
    body = json.dumps({"model": "auto", "messages": [{"role": "user", "content": REVERSE}], "moerge": moerge})
    response = await world.http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == status
    assert says in response.json()["error"]["message"]
    assert world.engine.asked == []


@pytest.mark.parametrize(
    ("model", "moerge", "says"),
    [
        ("reverse", {"experts": ["shout", "count"]}, "send 'model': 'auto'"),
        ("auto:arrow", {"experts": ["shout", "count"]}, "send 'model': 'auto'"),
        ("reverse", {"gate": "arrow"}, "answers itself"),
        ("auto:arrow", {"gate": "spectr"}, "asks for 'arrow'"),
    ],
)
async def test_two_answers_to_one_question_are_refused(world, model, moerge, says):
    response = await world.ask(model, REVERSE, moerge=moerge)
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]


@pytest.mark.parametrize("given", [[1], "x", 7])
async def test_arguments_that_are_no_object_are_refused(world, given):
    response = await world.ask("auto:constant", REVERSE, vllm_xargs=given)
    assert response.status_code == 400
    assert "vllm_xargs" in response.json()["error"]["message"]


@pytest.mark.parametrize("key", ["moerge_weights", "moerge_trace", "moerge_anything"])
async def test_the_server_s_own_arguments_are_refused(world, key):
    response = await world.ask("reverse", REVERSE, vllm_xargs={key: [1.0]})
    assert response.status_code == 400
    assert key in response.json()["error"]["message"]
    assert world.engine.asked == []


async def test_what_is_counted_is_not_routed_whatever_is_asked(world):
    response = await world.http.post("/tokenize", json={"prompt": "x", "moerge": {"gate": "arrow", "trace": True}})
    assert response.status_code == 200
    assert world.engine.asked[-1].body == {"prompt": "x", "model": "tiny"}


# Tenants


@pytest.fixture
async def tenants(serve, register, adapters):
    """Ann has a private expert. The headers of ann, bob and the operator."""
    async with serve() as world:
        headers = {}
        for owner in ("ann", "bob", "operator"):
            _, token = await asyncio.to_thread(world.registry.keys.create, owner, ["infer", "admin"])
            headers[owner] = {"authorization": f"Bearer {token}"}
        options = {"owner": "ann", "visibility": "private", "samples": ["spell pear backwards please"]}
        await asyncio.to_thread(register, world.registry, "secret", adapters[3], State.ACTIVE, **options)
        await world.service.refresh()
        yield world, headers


async def test_a_private_expert_is_in_nobody_else_s_composite(tenants):
    world, headers = tenants
    for gate in ("arrow", "constant", "evidence"):
        theirs = await world.ask(f"auto:{gate}", REVERSE, headers=headers["bob"])
        assert list(experts_of(theirs)) == ALL
        own = await world.ask(f"auto:{gate}", REVERSE, headers=headers["ann"])
        assert "secret" in experts_of(own)


async def test_a_private_expert_cannot_be_named_by_anybody_else(tenants):
    world, headers = tenants
    named = {"experts": ["secret", "count"]}
    unheard = {"experts": ["unheard", "count"]}
    refused = await world.ask("auto", REVERSE, moerge=named, headers=headers["bob"])
    same = await world.ask("auto", REVERSE, moerge=unheard, headers=headers["bob"])
    assert refused.status_code == same.status_code == 404
    text = refused.json()["error"]["message"].replace("secret", "unheard", 1)
    assert text == same.json()["error"]["message"]
    assert (await world.ask("auto", REVERSE, moerge=named, headers=headers["ann"])).status_code == 200


async def test_a_trace_is_for_whoever_asked_and_the_operator(tenants):
    world, headers = tenants
    asked = await world.ask("auto:arrow", REVERSE, moerge={"trace": True}, headers=headers["ann"])
    path = asked.headers["x-moerge-trace"]
    assert (await world.http.get(path, headers=headers["ann"])).json()["experts"][2] == "secret"
    assert (await world.http.get(path, headers=headers["operator"])).status_code == 200
    refused = await world.http.get(path, headers=headers["bob"])
    assert refused.status_code == 404
    assert "secret" not in refused.text


async def test_neutral_prompts_are_none_that_the_expert_s_owner_may_not_read(tenants):
    world, _ = tenants
    service = world.service
    assert "spell pear backwards please" not in service.calibration.neutral(service.active("count"))
    private = service.calibration.neutral(service.active("secret"))
    assert "spell banana backwards" in private
    assert "spell pear backwards please" not in private


# Traces


async def test_a_trace_tells_what_was_decided_and_used(world):
    response = await world.ask("auto:constant", REVERSE, moerge={"trace": True})
    trace = (await world.http.get(response.headers["x-moerge-trace"])).json()
    assert trace["id"] == response.headers["x-moerge-decision-id"]
    assert (trace["gate"], trace["experts"], trace["model"]) == ("constant", ALL, "auto:constant")
    assert trace["weights"][0] == pytest.approx([each["weight"] for each in trace["decision"]["experts"]])
    assert (trace["tokens"], trace["top"]) == (3, [1, 1, 1])
    assert "trace" not in response.json()  # the answer is the engine's own


async def test_the_trace_of_a_stream_can_be_asked_for_before_it_ends(world):
    call = world.chat("auto:arrow", REVERSE, stream=True, moerge={"trace": True})
    start = await call.next()
    headers = {key.decode(): value.decode() for key, value in start["headers"]}
    assert (await world.http.get(headers["x-moerge-trace"])).json()["tokens"] == 3
    await call.done()


@pytest.mark.parametrize("model", ["auto", "reverse", "tiny"])
async def test_without_a_gate_there_is_nothing_to_trace(world, model):
    response = await world.ask(model, REVERSE, moerge={"trace": True})
    assert response.status_code == 200
    assert "x-moerge-trace" not in response.headers
    missing = await world.http.get(f"/v1/traces/{response.headers['x-moerge-decision-id']}")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "trace_not_found")


async def test_nothing_is_traced_unless_it_is_asked_for(world):
    response = await world.ask("auto:arrow", REVERSE)
    assert "x-moerge-trace" not in response.headers
    assert arguments(world) is None


async def test_a_route_can_be_traced(world):
    body = {"model": "auto:arrow", "prompt": REVERSE}
    assert (await world.http.post("/v1/route", json=body)).json()["trace"] is None
    assert world.engine.asked == []
    explained = (await world.http.post("/v1/route", json={**body, "trace": True})).json()
    assert explained["trace"]["id"] == explained["decision"]["id"]
    assert explained["trace"]["experts"] == ALL
    assert world.engine.asked[-1].body["max_tokens"] == 1
    assert "trace" not in world.engine.asked[-1].body


async def test_tracing_a_probe_s_route_makes_its_decision(world):
    world.engine.evidence = {"shout": 30_000.0}
    body = {"model": "auto:probe", "messages": [{"role": "user", "content": REVERSE}]}
    assert (await world.http.post("/v1/route", json=body)).json()["decision"]["kind"] == "gate"
    explained = (await world.http.post("/v1/route", json={**body, "moerge": {"trace": True}})).json()
    assert (explained["decision"]["kind"], explained["decision"]["experts"][0]["expert"]) == ("select", "shout")
    assert explained["trace"]["evidence"] == [0, 0, 30_000]


async def test_a_prompt_that_the_engine_does_not_take_is_said_to_be_so(world):
    await world.ask("auto:arrow", REVERSE)
    world.engine.answer = (400, {"error": {"message": "too long"}})
    response = await world.http.post("/v1/route", json={"model": "auto:arrow", "prompt": REVERSE, "trace": True})
    assert response.status_code == 400
    assert "too long" in response.json()["error"]["message"]
    response = await world.http.post("/v1/route", json={"prompt": REVERSE, "trace": 1})
    assert response.status_code == 400
