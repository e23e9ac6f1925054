"""Blends through the whole server, without vLLM: mixtures of the router, `moerge.operator`, what is refused."""

from __future__ import annotations

import asyncio
import json
import logging
import math

import pytest
import torch
from blockbuster import blockbuster_ctx

from adapters_registry.expert import State
from router.adapter import Adapter
from router.blending import LINEAGE, OPERATORS
from router.decision import Decision, Weighted
from serving.inference import PATHS

REVERSE = "spell cherry backwards"
FAR = "zebra quartz"
NAMED = {"experts": {"count": 0.6, "shout": 0.4}, "operator": "ties"}
MIXTURE = {"method": "retrieval", "methods": {"retrieval": {"top_k": 3, "threshold": -1, "weights": "uniform"}}}


@pytest.fixture
async def mixing(serve):
    """A server whose `auto` blends three experts."""
    async with serve(router=MIXTURE) as world:
        yield world
        assert world.engine.lost == []


def experts_of(response):
    pairs = [each.partition("=") for each in response.headers["x-moerge-experts"].split(",") if each]
    return {name: float(weight) for name, _, weight in pairs}


def sent(world):
    return world.engine.asked[-1].body


def built(world):
    return [each for each in (world.folder / "built").iterdir() if not each.name.startswith(".")]


def lineage(world, body=None):
    """What the blend that answered says of itself."""
    return json.loads((world.engine.paths[(body or sent(world))["model"]] / LINEAGE).read_bytes())


def updates(folder, weights=None):
    """Every module's dW; of a composite for the constant gate with these weights."""
    adapter = Adapter(folder)
    if weights is None:
        return {module: adapter.dense(module) for module in adapter.modules}
    rows = torch.tensor(weights, dtype=torch.float64).repeat_interleave(adapter.config.r // len(weights))
    factors = {module: adapter.factors(module) for module in adapter.modules}
    return {module: each.B * rows @ each.A for module, each in factors.items()}


# Decisions of the router


async def test_a_mixture_is_one_blend(mixing):
    response = await mixing.ask("auto", REVERSE)
    assert response.headers["x-moerge-method"] == "retrieval"
    assert response.headers["x-moerge-operator"] == "cat"
    assert experts_of(response) == pytest.approx({"count": 1 / 3, "reverse": 1 / 3, "shout": 1 / 3}, abs=1e-3)
    name = sent(mixing)["model"]
    found = await asyncio.to_thread(lineage, mixing)
    assert name == f"blend:cat@{found['digest'][:32]}"
    assert response.json()["model"] == f"blend:{found['digest'][:12]}"
    assert [each["weight"] for each in found["members"]] == pytest.approx([1 / 3] * 3)
    assert "vllm_xargs" not in sent(mixing)


async def test_decisions_that_are_nearly_equal_share_a_blend(serve):
    settings = {"top_k": 3, "threshold": -1, "spread": 1.0, "grid": 0.1}
    async with serve(router={"method": "retrieval", "methods": {"retrieval": settings}}) as world:
        for k in range(4):
            await world.ask("auto", f"{REVERSE} {'please ' * k}")
        assert len({each.body["model"] for each in world.engine.asked}) == 1
        assert len(built(world)) == 1


async def test_the_mixture_can_be_merged_by_another_operator_for_one_call(mixing):
    await mixing.ask("auto", REVERSE, moerge={"operator": "ties", "settings": {"density": 0.5}})
    found = await asyncio.to_thread(lineage, mixing)
    assert (found["operator"], found["settings"]["density"], len(found["members"])) == ("ties", 0.5, 3)


async def test_an_operator_needs_somebody_to_merge(world, serve):
    refused = await world.ask("auto", REVERSE, moerge={"operator": "ties"})
    assert refused.status_code == 400
    assert "'fusion' is not set to" in refused.json()["error"]["message"]
    gated = await world.ask("auto:arrow", REVERSE, moerge={"operator": "ties"})
    assert gated.status_code == 400
    nearest = {"method": "retrieval", "methods": {"retrieval": {"top_k": 3}}}
    async with serve(router=nearest) as few:  # who is near enough is alone
        assert (await few.ask("auto", REVERSE, moerge={"operator": "ties"})).json()["model"] == "reverse"
        assert (await few.ask("auto", FAR, moerge={"operator": "ties"})).json()["model"] == "tiny"


async def test_when_a_blend_cannot_be_made_or_loaded_the_base_model_answers(serve, caplog):
    methods = {"retrieval": {"top_k": 3, "threshold": -1, "operator": "fisher"}}
    async with serve(router={"method": "retrieval", "methods": methods}) as world:
        response = await world.ask("auto", REVERSE)
        assert response.json()["model"] == "tiny"
        assert "x-moerge-operator" not in response.headers
        assert "moerge expert stats" in caplog.text
        assert built(world) == []


async def test_a_route_is_explained_with_its_operator(mixing):
    explained = (await mixing.http.post("/v1/route", json={"model": "auto", "prompt": REVERSE})).json()
    assert (explained["decision"]["kind"], explained["decision"]["operator"]) == ("blend", "cat")
    assert mixing.engine.asked == []


# The field `moerge`


async def test_experts_can_be_merged_with_weights(world):
    response = await world.ask("auto", FAR, moerge={**NAMED, "settings": {"density": 0.3}})
    assert response.headers["x-moerge-method"] == "named"
    assert response.headers["x-moerge-operator"] == "ties"
    assert experts_of(response) == {"count": 0.6, "shout": 0.4}
    found = await asyncio.to_thread(lineage, world)
    assert {each["id"].partition("@")[0]: each["weight"] for each in found["members"]} == {"count": 0.6, "shout": 0.4}
    assert found["settings"]["density"] == 0.3
    assert "moerge" not in sent(world)


async def test_every_operator_answers(world):
    for operator in (name for name in OPERATORS if OPERATORS[name].statistic is None):
        settings = {"layers": {"count": "0"}} if operator == "layer_swap" else {}
        moerge = {"experts": ["count", "shout"], "operator": operator, "settings": settings}
        response = await world.ask(None, FAR, moerge=moerge)
        assert response.status_code == 200
        assert sent(world)["model"].startswith(f"blend:{operator}@")
        assert response.json()["model"].startswith("blend:")


async def test_operators_with_statistics_use_what_is_stored(world):
    moerge = {"experts": ["count", "shout"], "operator": "fisher"}
    refused = await world.ask("auto", FAR, moerge=moerge)
    assert refused.status_code == 422
    assert refused.json()["error"]["code"] == "blend_refused"
    assert {name for name in ("count", "shout") if f"'{name}@" in refused.json()["error"]["message"]} == {
        "count",
        "shout",
    }

    def measure():
        for name in ("count", "shout"):
            expert = world.service.active(name)
            shapes = {module: Adapter(expert.path).shape(module) for module in Adapter(expert.path).modules}
            fisher = {module: torch.rand(shape).numpy() for module, shape in shapes.items()}
            world.registry.set_tensors(name, expert.version, "fisher", fisher)

    await asyncio.to_thread(measure)
    await world.service.refresh()
    assert (await world.ask("auto", FAR, moerge=moerge)).status_code == 200


async def test_one_expert_answers_alone_or_scaled(world):
    alone = {"experts": ["shout"], "operator": "ties"}
    assert (await world.ask("auto", FAR, moerge=alone)).json()["model"] == "shout"
    await world.ask("auto", FAR, moerge={**alone, "settings": {"rank": 2}})
    assert (await asyncio.to_thread(lineage, world))["rank"] == 2
    await world.ask("auto", FAR, moerge={"experts": {"shout": 0.5}, "operator": "cat"})
    half = await asyncio.to_thread(updates, world.engine.paths[sent(world)["model"]])
    whole = await asyncio.to_thread(updates, world.service.active("shout").path)
    torch.testing.assert_close(half, {module: 0.5 * dW for module, dW in whole.items()}, check_dtype=False)


async def test_a_blend_over_the_engine_s_rank_is_cut_to_it_and_the_log_says_what_went(serve, caplog):
    caplog.set_level(logging.INFO, logger="moerge")
    async with serve(engine={"max_rank": 8}) as world:
        response = await world.ask("auto", FAR, moerge={"experts": ["count", "reverse", "shout"], "operator": "cat"})
        assert response.status_code == 200
        assert (await asyncio.to_thread(lineage, world))["rank"] == 8
        assert "4 of 4 modules were cut to it, which discards" in caplog.text
        refused = await world.ask("auto", FAR, moerge={**NAMED, "settings": {"rank": 9}})
        assert refused.status_code == 422
        assert "over the engine's limit of 8" in refused.json()["error"]["message"]


REFUSED = [
    ({**NAMED, "experts": {"count": math.nan, "shout": 1}}, 400, "finite"),
    ({**NAMED, "experts": {"count": 0, "shout": 0}}, 400, "all weights are zero"),
    ({**NAMED, "experts": {"count": 1, "shout": None}}, 400, "a weight, or none"),
    ({**NAMED, "experts": {"count": 1, "shout": 1e9}}, 400, "at most 1000"),
    ({**NAMED, "experts": []}, 400, "1 to 64"),
    ({**NAMED, "experts": ["count", "nobody"]}, 404, "nobody"),
    ({**NAMED, "operator": "nonsense"}, 400, "No operator 'nonsense'"),
    ({**NAMED, "settings": {"density": 1.5}}, 400, "density"),
    ({**NAMED, "settings": {"froce": 1}}, 400, "froce"),
    ({**NAMED, "gate": "arrow"}, 400, "name only one"),
    ({**NAMED, "compress": 2}, 400, "not for an operator"),
    ({**NAMED, "general": "reverse"}, 400, "not for an operator"),
    ({"experts": {"count": 1, "shout": -1}, "operator": "smear"}, 422, "no weight may be negative"),
    ({"experts": ["count", "shout"], "operator": "regmean"}, 422, "moerge expert stats"),
]


async def test_nonsense_is_refused_and_never_reaches_the_engine(world):
    for moerge, status, says in REFUSED:
        body = {"model": "auto", "messages": [{"role": "user", "content": REVERSE}], "moerge": moerge}
        headers = {"content-type": "application/json"}  # as text: NaN is no JSON, but Python reads it
        response = await world.http.post("/v1/chat/completions", content=json.dumps(body), headers=headers)
        assert (response.status_code, moerge) == (status, moerge)
        assert says in response.json()["error"]["message"]
    assert world.engine.asked == []
    assert built(world) == []


@pytest.mark.parametrize("model", ["reverse", "tiny"])
async def test_an_operator_is_no_answer_of_a_named_model(world, model):
    response = await world.ask(model, REVERSE, moerge={"operator": "ties"})
    assert response.status_code == 400
    assert "answers itself" in response.json()["error"]["message"]


# Experts, engine and disk


async def test_any_decision_to_blend_can_be_held(world):
    experts = tuple(Weighted(expert=name, id=world.service.active(name).id, weight=0.5) for name in ("shout", "count"))
    decision = Decision(
        method="named", kind="blend", experts=experts, operator="dare_ties", operator_settings={"seed": 3}
    )
    async with world.service.hold(decision) as name:
        assert name in world.engine.shown
    async with world.service.hold(decision) as again:
        assert again == name


async def test_blends_on_every_path_never_block_the_event_loop(mixing):
    body = {"prompt": REVERSE, "messages": [{"role": "user", "content": REVERSE}], "input": REVERSE}
    with blockbuster_ctx(["serving", "router", "adapters_registry"]):
        for path in PATHS:
            assert (await mixing.http.post(path, json={"model": "auto", **body})).status_code == 200
            assert (await mixing.http.post(path, json={**body, "moerge": NAMED})).status_code == 200
        await mixing.service._clear()


async def test_64_requests_at_once_build_each_blend_once(world):
    operators = ["cat", "ties", "linear", "svd"]
    moerge = [{"experts": ["count", "shout"], "operator": each} for each in operators]
    responses = await asyncio.gather(*(world.ask("auto", FAR, moerge=moerge[k % 4]) for k in range(64)))
    assert {each.status_code for each in responses} == {200}
    assert [each.json()["model"] for each in responses[:4]] * 16 == [each.json()["model"] for each in responses]
    assert len(built(world)) == 4


async def test_when_the_disk_is_full_routed_requests_go_on_and_named_ones_are_told(world, mixing, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("serving.recipes.blend", full)
    assert (await mixing.ask("auto", REVERSE)).json()["model"] == "tiny"
    response = await world.ask("auto", FAR, moerge=NAMED)
    assert (response.status_code, response.json()["error"]["code"]) == (507, "store_full")
    assert built(world) == []
    assert list((world.folder / "built" / ".staging").iterdir()) == []
    monkeypatch.undo()
    assert (await world.ask("auto", FAR, moerge=NAMED)).status_code == 200


async def test_a_blend_that_the_engine_refuses(world, monkeypatch):
    monkeypatch.setattr("serving.recipes.blend_name", lambda digest: "blend:bad")
    world.engine.refuses.add("blend:bad")
    response = await world.ask("auto", FAR, moerge=NAMED)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "expert_load_failed")


async def test_a_member_that_retires_while_its_blend_answers(watchful, world, until):
    world.engine.gate.clear()
    call = world.chat("auto", FAR, moerge=NAMED)
    await until(lambda: world.engine.waiting)
    name = sent(world)["model"]
    await asyncio.to_thread(world.registry.retire, "shout")
    await until(lambda: not any(each.startswith("shout@") for each in world.service._by_id))
    await world.service._clear()
    assert name in world.engine.shown
    assert len(built(world)) == 1
    world.engine.gate.set()
    await call.done()
    assert (await call.next())["status"] == 200
    await until(lambda: name not in world.engine.shown)
    await until(lambda: built(world) == [])
    assert (await world.ask("auto", FAR, moerge=NAMED)).status_code == 404


async def test_a_restarted_engine_gets_its_blends_again(watchful, mixing, until):
    first = await mixing.ask("auto", REVERSE)
    mixing.engine.dead = True
    await until(lambda: mixing.engine.starts == 2 and mixing.service.failure is None)
    assert (await mixing.ask("auto", REVERSE)).json()["model"] == first.json()["model"]


async def test_more_blends_than_the_engine_keeps(serve):
    async with serve(engine={"resident": 2}) as world:
        moerge = [{"experts": {"count": 1, "shout": k / 8}, "operator": "cat"} for k in range(1, 9)]
        responses = await asyncio.gather(*(world.ask("auto", FAR, moerge=moerge[k % 8]) for k in range(32)))
        assert len({each.json()["model"] for each in responses}) == 8
        assert len(world.engine.shown) <= 2
        assert world.engine.lost == []


async def test_the_disk_holds_no_more_than_it_may_once_nobody_uses_it(serve, until):
    async with serve(engine={"built_mb": 0.03}) as world:  # two blends of these experts
        for k in range(1, 5):
            await world.ask("auto", FAR, moerge={"experts": {"count": 1, "shout": k / 8}, "operator": "cat"})
        newest = sent(world)["model"]
        await world.service._clear()
        names = [name for name in world.engine.shown if name.startswith("blend:")]
        assert newest in names
        assert len(built(world)) == len(names) < 4
        assert sum(file.stat().st_size for each in built(world) for file in each.iterdir()) <= 0.03 * 2**20


# Resident composites


async def test_a_sum_of_experts_of_one_group_needs_no_load_and_answers_alike(world):
    moerge = {"experts": {"shout": 0.75, "count": -0.25}, "operator": "cat"}
    await world.ask("auto", FAR, moerge=moerge)
    alone = await asyncio.to_thread(updates, world.engine.paths[sent(world)["model"]])
    await world.http.post("/v1/groups/build", json={})
    loads = world.service.residency.loads
    response = await world.ask("auto", FAR, moerge=moerge)
    assert world.service.residency.loads == loads
    assert response.headers["x-moerge-operator"] == "cat"
    assert experts_of(response) == {"shout": 0.75, "count": -0.25}
    weights = sent(world)["vllm_xargs"]["moerge_weights"]
    assert weights == [-0.25, 0.0, 0.75]  # count, reverse, shout
    shared = await asyncio.to_thread(updates, world.engine.paths[sent(world)["model"]], weights)
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-7)


async def test_a_mixture_inside_a_group_needs_no_load(mixing):
    await mixing.http.post("/v1/groups/build", json={})
    loads = mixing.service.residency.loads
    assert (await mixing.ask("auto", REVERSE)).headers["x-moerge-operator"] == "cat"
    assert sent(mixing)["model"].startswith("auto:constant@")
    assert "vllm_xargs" not in sent(mixing)  # equal weights are what the composite has
    assert mixing.service.residency.loads == loads


async def test_a_distribution_s_average_is_a_sum_and_other_blends_are_none(world):
    await world.http.post("/v1/groups/build", json={})
    others = [
        {"experts": ["shout", "count"], "operator": "ties"},
        {"experts": ["shout", "count"], "operator": "linear"},
        {"experts": {"shout": 2, "count": 1}, "operator": "smear"},
        {"experts": ["shout", "count"], "operator": "cat", "settings": {"rank": 2}},
    ]
    for moerge in others:
        await world.ask("auto", FAR, moerge=moerge)
        assert sent(world)["model"].startswith(f"blend:{moerge['operator']}@")
    await world.ask("auto", FAR, moerge={"experts": {"shout": 0.75, "count": 0.25}, "operator": "smear"})
    assert sent(world)["model"].startswith("auto:constant@")


async def test_a_group_without_constant_weights_does_not_serve_blends(world):
    await world.http.post("/v1/groups/build", json={"gates": ["arrow"]})
    await world.ask("auto", FAR, moerge={"experts": ["shout", "count"], "operator": "cat"})
    assert sent(world)["model"].startswith("blend:cat@")


# Tenants


async def test_private_experts_are_blended_for_their_owner_only_and_in_no_group(serve, register, adapters):
    async with serve(router=MIXTURE) as world:
        headers = {}
        for owner in ("ann", "bob", "operator"):
            _, token = await asyncio.to_thread(world.registry.keys.create, owner, ["infer", "admin"])
            headers[owner] = {"authorization": f"Bearer {token}"}
        options = {"owner": "ann", "visibility": "private", "samples": ["spell pear backwards please"]}
        await asyncio.to_thread(register, world.registry, "secret", adapters[3], State.ACTIVE, **options)
        await world.service.refresh()
        await world.service.groups.build()
        moerge = {"experts": ["secret", "count"], "operator": "cat"}
        refused = await world.ask("auto", FAR, moerge=moerge, headers=headers["bob"])
        assert refused.status_code == 404
        assert "secret" not in experts_of(await world.ask("auto", REVERSE, headers=headers["bob"]))
        assert sent(world)["model"].startswith("auto:constant@")
        assert "secret" in experts_of(await world.ask("auto", REVERSE, headers=headers["ann"]))
        assert sent(world)["model"].startswith("blend:cat@")
        assert (await world.ask("auto", FAR, moerge=moerge, headers=headers["ann"])).status_code == 200
        assert sent(world)["model"].startswith("blend:cat@")


# What is told


async def test_metrics_and_log_tell_of_blends(world, caplog):
    caplog.set_level(logging.INFO, logger="moerge")
    for _ in range(2):
        await world.ask("auto", FAR, moerge=NAMED)
    await world.service._clear()
    metrics = (await world.http.get("/metrics")).text
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    assert float(values['moerge_blends_total{operator="ties",outcome="built"}']) >= 1
    assert float(values['moerge_build_seconds_count{kind="blend"}']) >= 1
    assert float(values["moerge_blend_bytes"]) == sum(file.stat().st_size for file in built(world)[0].iterdir())
    assert "kind=blend operator=ties experts=count=0.6,shout=0.4" in caplog.text
