"""Groups: experts that are alike are loaded together, and decisions inside a group need no load."""

from __future__ import annotations

import asyncio

import pytest

from adapters_registry.expert import State

REVERSE = "spell cherry backwards"
FAR = "zebra quartz"
MIXED = {"experts": {"shout": 0.75, "count": 0.25}}


async def build(world, **body):
    return await world.http.post("/v1/groups/build", json=body)


def sent(world):
    return world.engine.asked[-1].body


def names(world):
    return [[each.name for each in group.experts] for group in world.service.groups]


def experts_of(response):
    return response.headers["x-moerge-experts"]


async def test_there_are_none_unless_they_are_asked_for(world):
    body = (await world.http.get("/v1/groups")).json()
    assert body == {"object": "list", "by": None, "data": []}
    await world.ask("auto:constant", REVERSE)
    assert len(world.engine.shown) == 1


@pytest.mark.parametrize("by", ["weights", "prototypes"])
async def test_configured_groups_are_loaded_before_anybody_asks(serve, until, by):
    settings = {"by": by, "gates": ["constant", "arrow"]}
    async with serve(groups=settings, engine={"resident": 8}) as world:
        await until(lambda: len(world.engine.shown) == 2)
        await until(lambda: list(world.service.groups))
        body = (await world.http.get("/v1/groups")).json()
        assert body["by"] == by
        assert body["data"] == [
            {"object": "group", "experts": ["count", "reverse", "shout"], "gates": ["constant", "arrow"], "rank": 12}
        ]
        loads = world.service.residency.loads
        await world.ask("auto:constant", REVERSE)
        await world.ask("auto:arrow", REVERSE)
        assert world.service.residency.loads == loads


async def test_a_decision_inside_a_group_masks_the_others(world):
    await build(world)
    [group] = world.service.groups
    loads = world.service.residency.loads
    response = await world.ask("auto", FAR, moerge=MIXED)
    assert sent(world)["vllm_xargs"]["moerge_weights"] == [0.25, 0.0, 0.75]  # count, reverse, shout
    assert experts_of(response) == "count=0.25,shout=0.75"
    assert world.service.residency.loads == loads
    other = {"experts": ["shout", "count"], "gate": "constant", "settings": {"weights": [0.5, 0.5]}}
    await world.ask("auto", FAR, moerge=other)  # other settings are another composite
    assert sent(world)["model"] != f"auto:constant@{group.gates['constant'].id}"
    assert world.service.residency.loads == loads + 1


async def test_evidence_and_probes_look_at_the_decision_s_experts_only(world):
    await build(world, gates=["evidence", "probe"])
    loads = world.service.residency.loads
    await world.ask("auto", FAR, moerge={"experts": ["shout", "count"], "gate": "evidence"})
    assert sent(world)["vllm_xargs"]["moerge_weights"] == [0.5, 0.0, 0.5]
    world.engine.evidence = {"reverse": 100.0, "shout": 1.0}
    response = await world.ask("auto", FAR, moerge={"experts": ["shout", "count"], "gate": "probe"})
    assert experts_of(response) == "shout=1"
    assert world.service.residency.loads == loads + 1  # the expert itself


async def test_other_gates_weigh_the_whole_group_but_never_for_experts_that_were_named(serve):
    async with serve(router={"methods": {"retrieval": {}, "arrow": {"shortlist": 2}}}) as world:
        await build(world, gates=["arrow"])
        assert experts_of(await world.ask("auto:arrow", REVERSE)).count("=") == 3
        named = {"experts": ["shout", "count"], "gate": "arrow"}
        assert experts_of(await world.ask("auto", FAR, moerge=named)) == "count=0.5,shout=0.5"


async def test_groups_follow_the_registry(watchful, world, until, register, adapters):
    await build(world)
    await asyncio.to_thread(world.registry.retire, "shout")
    await until(
        lambda: [[each.name for each in group.experts] for group in world.service.groups] == [["count", "reverse"]]
    )
    await until(lambda: len(world.engine.shown) == 1)  # the old composite was let go
    await asyncio.to_thread(register, world.registry, "translate", adapters[3], State.ACTIVE)
    await until(lambda: names(world) == [["count", "reverse", "translate"]])


async def test_a_group_with_somebody_who_left_is_not_used_meanwhile(world):
    await build(world)
    await asyncio.to_thread(world.registry.retire, "reverse")
    world.service.groups._by = None  # nobody builds them anew
    await world.service.refresh()
    await world.ask("auto", FAR, moerge=MIXED)
    assert sent(world)["vllm_xargs"]["moerge_weights"] == [0.25, 0.75]


async def test_private_experts_are_in_no_group(world):
    await asyncio.to_thread(world.registry.update, "reverse", visibility="private")
    await world.service.refresh()
    body = (await build(world)).json()
    assert [each["experts"] for each in body["data"]] == [["count", "shout"]]
    await asyncio.to_thread(world.registry.update, "count", visibility="private")
    await world.service.refresh()
    assert (await build(world)).json()["data"] == []


async def test_a_group_takes_no_more_than_the_engine_s_rank(serve):
    async with serve(engine={"max_rank": 8}) as world:
        body = (await build(world)).json()
        assert [len(each["experts"]) for each in body["data"]] == [2]  # the third would be alone


async def test_a_composite_that_cannot_be_loaded_is_left_out(serve, caplog):
    async with serve(engine={"resident": 8}) as world:
        world.engine.refuses.add("auto:arrow")
        body = (await build(world, gates=["arrow", "constant", "phatgoose"])).json()
        assert body["data"][0]["gates"] == ["constant"]
        assert "has no composite for arrow" in caplog.text
        assert "has no composite for phatgoose" in caplog.text


@pytest.mark.parametrize(
    ("body", "says"), [({"gates": ["nonsense"]}, "nonsense"), ({"by": "name"}, "by"), ({"froce": 1}, "froce")]
)
async def test_nonsense_is_refused(world, body, says):
    response = await build(world, **body)
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]


async def test_only_the_operator_builds_groups(serve):
    async with serve() as world:
        _, token = await asyncio.to_thread(world.registry.keys.create, "ann", ["infer", "admin"])
        response = await world.http.post("/v1/groups/build", json={}, headers={"x-api-key": token})
        assert response.status_code == 403
        assert (await world.http.get("/v1/groups", headers={"x-api-key": token})).status_code == 200
