"""`/v1/blends`: stored blends, from their creation to their use."""

from __future__ import annotations

import asyncio
import errno
import json
import re
from pathlib import Path

import pytest
import torch

from adapters_registry.errors import StoreFull
from router.adapter import Adapter
from router.blending import LINEAGE
from serving.engine import AdapterLoadFailed
from serving.inference import PATHS, TOKEN_PATHS

PROMPT = "anything at all"


async def store(world, name="both", members=None, **more):
    body = {"members": {"count": 0.6, "shout": 0.4} if members is None else members, **more}
    if name is not None:
        body["name"] = name
    headers = body.pop("headers", None)
    return await world.http.post("/v1/blends", json=body, headers=headers)


async def post(world, content):
    return await world.http.post("/v1/blends", content=content, headers={"content-type": "application/json"})


def reasons(response):
    assert response.status_code == 422, response.text
    error = response.json()["error"]
    assert error["code"] == "blend_refused"
    return [each["message"] for each in error["reasons"]]


async def stored(world, tenant=None):
    return await asyncio.to_thread(world.registry.blends.list, tenant)


@pytest.fixture
async def tenants(world):
    """Headers of the operator, and of the tenants ann and bob."""

    def make(owner):
        return {"authorization": f"Bearer {world.registry.keys.create(owner, {'admin'})[1]}"}

    return {name: await asyncio.to_thread(make, name) for name in ("operator", "ann", "bob")}


# Storing


async def test_a_blend_is_built_and_answers_the_next_request(world):
    response = await store(world, description="Two together.")
    assert response.status_code == 201, response.text
    body = response.json()
    assert body["id"] == f"blend:{body['digest'][:12]}"
    assert [(each["expert"], each["version"], each["weight"]) for each in body["members"]] == [
        ("count", 1, 0.6),
        ("shout", 1, 0.4),
    ]
    assert body["report"] == {"rank": 8, "modules": 4, "cut": 0, "discarded": 0.0, "worst": 0.0}
    assert (body["operator"], body["visibility"], body["owner"]) == ("cat", "public", None)
    assert body["licence"] == "Apache-2.0"
    assert body["usable"]
    assert body["loaded"]
    for model in ("both", body["id"], f"blend:{body['digest']}"):
        answer = await world.ask(model, PROMPT)
        assert answer.status_code == 200, answer.text
        assert answer.json()["model"] == body["id"]
        assert answer.headers["x-moerge-method"] == "named"
        assert answer.headers["x-moerge-experts"] == "count=0.6,shout=0.4"


async def test_what_is_built_is_the_weighted_sum(world):
    body = (await store(world)).json()
    path = world.engine.paths[f"blend:cat@{body['digest'][:32]}"]
    assert json.loads((path / LINEAGE).read_text())["digest"] == body["digest"]
    made = Adapter(path)
    count, shout = (Adapter(world.service.active(name).path) for name in ("count", "shout"))
    for module in made.modules:
        torch.testing.assert_close(made.dense(module), 0.6 * count.dense(module) + 0.4 * shout.dense(module))


async def test_a_name_may_be_left_out(world):
    body = (await store(world, None)).json()
    assert body["name"] is None
    assert (await world.ask(body["id"], PROMPT)).status_code == 200
    assert (await store(world, None)).json() == body, "the same again is the same"
    listed = (await world.http.get("/v1/blends")).json()["data"]
    assert [each["id"] for each in listed] == [body["id"]]


async def test_members_may_be_a_list(world):
    body = (await store(world, members=["count", "shout"])).json()
    assert [each["weight"] for each in body["members"]] == [0.5, 0.5]
    body = (await store(world, "other", ["count", "shout", "count"], weights=[0.5, 1, 0.25])).json()
    assert {each["expert"]: each["weight"] for each in body["members"]} == {"count": 0.75, "shout": 1.0}


async def test_operators_take_their_settings_either_way(world):
    one = (await store(world, "one", operator="ties", density=0.3)).json()
    two = (await store(world, "two", operator="ties", settings={"density": 0.3})).json()
    assert one["settings"] == two["settings"] == {"density": 0.3}
    assert one["digest"] == two["digest"]
    assert one["report"]["rank"] == 8
    assert (await world.ask("two", PROMPT)).json()["model"] == one["id"]
    response = await store(world, "x", operator="ties", density=0.3, settings={"density": 0.4})
    assert response.status_code == 400
    assert "'density' is given twice" in response.json()["error"]["message"]


async def test_how_the_weights_were_found_is_kept(world):
    search = {"method": "lorahub", "loss": 0.25, "steps": 40}
    assert (await store(world, search=search)).json()["search"] == search
    assert (await world.http.get("/v1/blends/both")).json()["search"] == search


async def test_replacing_is_asked_for(world):
    old = (await store(world)).json()
    assert "pass replace" in reasons(await store(world, members=["count"]))[0]
    assert (await world.ask(old["id"], PROMPT)).status_code == 200
    new = (await store(world, members={"reverse": 1.0}, replace=True)).json()
    assert (await world.ask("both", PROMPT)).json()["model"] == new["id"]
    assert (await world.ask(old["id"], PROMPT)).status_code == 404, "nobody stores it any more"


async def test_of_many_at_once_each_content_and_each_name_is_stored_once(world):
    same = await asyncio.gather(*(store(world, None) for _ in range(4)))
    assert [each.status_code for each in same] == [201] * 4
    assert len({each.json()["digest"] for each in same}) == 1
    named = await asyncio.gather(*(store(world, "one", {"count": weight}) for weight in (0.1, 0.2, 0.3)))
    assert sorted(each.status_code for each in named) == [201, 422, 422]
    assert [each.name for each in await stored(world)] == ["one", None]


# Blends of blends


async def test_a_blend_of_a_blend_is_one_of_its_members(world):
    inner = (await store(world, "inner", {"count": 0.5, "shout": -0.5}, operator="task_arithmetic")).json()
    body = (await store(world, "outer", {"inner": 2.0, "count": 0.25, "reverse": 1.0})).json()
    weights = {each["expert"]: each["weight"] for each in body["members"]}
    assert weights == {"count": 1.25, "shout": -1.0, "reverse": 1.0}
    assert [(each["name"], each["weight"]) for each in body["lineage"]] == [
        ("inner", 2.0),
        ("count", 0.25),
        ("reverse", 1.0),
    ]
    assert body["lineage"][0]["id"] == inner["id"]
    await world.http.delete("/v1/blends/inner")
    assert (await world.ask("outer", PROMPT)).status_code == 200, "it is made of the experts"
    by_content = (await store(world, "again", {body["id"]: 1.0})).json()
    assert by_content["digest"] == body["digest"]


async def test_what_is_no_sum_cannot_be_taken_apart(world):
    await store(world, "signs", operator="ties")
    assert "'signs' is a 'ties' blend" in reasons(await store(world, "x", {"signs": 1.0}))[0]
    await store(world, "sum")
    assert "a member of a 'ties' blend" in reasons(await store(world, "x", {"sum": 1.0}, operator="ties"))[0]


async def test_a_blend_that_cannot_be_used_is_no_member(world):
    await store(world, "inner")
    await asyncio.to_thread(world.registry.retire, "shout")
    await world.service.refresh()
    [reason] = reasons(await store(world, "x", {"inner": 1.0}))
    assert "version 1 of its member 'shout' is retired" in reason


# Refusing


async def test_every_reason_comes_at_once(world):
    told = reasons(
        await store(
            world,
            "count",
            ["nobody", "count", "shout"],
            weights=[1, 5000, 1, 2],
            operator="ties",
            density=1.5,
            rank=999,
        )
    )
    for text in (
        "The name 'count' is already taken, by an expert",
        "No expert 'nobody'. Registered: count, reverse, shout.",
        "There are 3 members and 4 weights",
        "The weight of 'count' is over 1000",
        "setting density",
    ):
        assert any(text in each for each in told), (text, told)
    assert await stored(world) == []
    assert (await store(world)).status_code == 201, "nothing was left of it"


#: What is wrong with a body, and the reason that is given.
REFUSED = [
    ({"members": {"count": float("nan"), "shout": 1}}, "weight nan"),
    ({"members": {"count": float("inf"), "shout": 1}}, "weight inf"),
    ({"members": {"count": 0, "shout": 0}}, "All weights are zero"),
    ({"members": {}}, "1 to 64 members, not 0"),
    ({"members": []}, "1 to 64 members, not 0"),
    ({"members": ["count"] * 65}, "1 to 64 members, not 65"),
    ({"members": ["count", "shout"], "weights": [1.0]}, "2 members and 1 weights"),
    ({"members": ["count"], "operator": "magic"}, "No operator 'magic'"),
    ({"members": ["nobody"], "operator": "magic"}, "No operator 'magic'"),
    ({"members": ["count", "shout"], "operator": "dare_ties", "density": 0.0}, "density"),
    ({"members": ["count", "shout"], "operator": "cat", "density": 0.5}, "density"),
    ({"members": ["count", "shout"], "operator": "fisher"}, "carries no 'fisher' statistics"),
    ({"members": ["count", "shout"], "operator": "svd", "rank": 10_000}, "over the engine's limit"),
    ({"members": {"count": 1, "shout": -1}, "operator": "smear"}, "no weight may be negative"),
    ({"members": ["count"], "name": "../../etc/passwd"}, "is not a name"),
    ({"members": ["count"], "name": "blend:0123456789ab"}, "is not a name"),
    ({"members": ["count"], "name": "auto"}, "reserved"),
    ({"members": {"../count": 1}}, "No expert '../count'"),
    ({"members": {"blend:0123456789ab": 1}}, "No expert 'blend:0123456789ab'"),
    ({"members": {"tiny": 1}}, "No expert 'tiny'"),
]


async def test_what_cannot_be_made_is_refused(world):
    for body, text in REFUSED:
        response = await post(world, json.dumps({"name": "x", **body}))
        assert any(text in each for each in reasons(response)), response.text
    assert await stored(world) == []


NO_REQUEST = [
    {},
    {"members": "count"},
    {"members": {"count": 1}, "weights": [1]},
    {"members": ["count"], "unknown": 1},
    {"members": ["count"], "visibility": "secret"},
    {"members": ["count"], "description": "a\0"},
    {"members": ["count"], "search": {"x": "y" * 70_000}},
    {"members": ["count"], "settings": {"x": float("nan")}},
    {"members": ["count"], "settings": 3},
]


async def test_what_is_no_request_is_a_400(world):
    for body in NO_REQUEST:
        response = await post(world, json.dumps(body))
        assert response.status_code == 400, (body, response.text)
    for field in ("settings", "search"):
        nested = '{"x":' * 20_000 + "1" + "}" * 20_000
        response = await post(world, f'{{"members": ["count"], "{field}": {nested}}}')
        assert response.status_code == 400, response.text
    assert await stored(world) == []


async def test_text_that_is_half_a_character_is_refused(world):
    for field in ({"name": "\ud800"}, {"members": ["\ud800"]}, {"description": "\ud800"}, {"operator": "\ud800"}):
        response = await post(world, json.dumps({"members": ["count"], **field}))
        assert response.status_code in (400, 422), response.text


async def test_a_blend_that_the_engine_does_not_load_is_not_stored(world, monkeypatch):
    load = world.engine.load

    async def refuse(adapter):
        if adapter.shown.startswith("blend:"):
            raise AdapterLoadFailed(adapter.shown, "it is not for me")
        await load(adapter)

    monkeypatch.setattr(world.engine, "load", refuse)
    response = await store(world)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "expert_load_failed")
    assert await stored(world) == []


async def test_a_failure_after_the_build_leaves_no_row(world, monkeypatch):
    def full(*_, **__):
        raise StoreFull("here")

    generation = world.registry.generation()
    with monkeypatch.context() as patch:
        patch.setattr(world.registry.blends, "create", full)
        assert (await store(world)).status_code == 507
    assert await stored(world) == []
    assert world.registry.generation() == generation
    assert (await store(world)).status_code == 201


async def test_a_full_disk_while_it_is_built_leaves_nothing(world, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("serving.recipes.blend", full)
        response = await store(world)
        assert (response.status_code, response.json()["error"]["code"]) == (507, "store_full")
    assert await stored(world) == []
    assert not list((world.folder / "built").glob("[0-9a-f]*"))
    assert (await store(world)).status_code == 201


async def test_a_member_that_retires_while_it_is_built_is_noticed(world, monkeypatch):
    create = world.registry.blends.create

    def late(new, **options):
        world.registry.retire("shout")
        return create(new, **options)

    monkeypatch.setattr(world.registry.blends, "create", late)
    assert "version 1 of its member 'shout' is retired" in reasons(await store(world))[0]
    assert await stored(world) == []


# Looking up, removing


async def test_blends_are_looked_up_and_removed(world):
    body = (await store(world)).json()
    for reference in ("both", body["id"], f"blend:{body['digest']}"):
        assert (await world.http.get(f"/v1/blends/{reference}")).json() == body
    assert (await world.http.get("/v1/blends")).json() == {"object": "list", "data": [body]}
    gone = await world.http.delete("/v1/blends/both")
    assert gone.json() == {"object": "blend.deleted", "name": "both", "id": body["id"], "deleted": True}
    for method, path in (("GET", "both"), ("GET", body["id"]), ("DELETE", "both")):
        response = await world.http.request(method, f"/v1/blends/{path}")
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "blend_not_found"
    for model in ("both", body["id"]):
        response = await world.ask(model, PROMPT)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


async def test_what_is_not_there_is_a_404(world):
    for reference in ("nothing", "blend:0123456789ab", "blend:", "..%2f..%2fetc", "%00", "blend:%25"):
        for method in ("GET", "DELETE"):
            response = await world.http.request(method, f"/v1/blends/{reference}")
            assert response.status_code == 404, reference


async def test_blends_are_among_the_models(world):
    named, nameless = (await store(world)).json(), (await store(world, None, ["reverse", "count"])).json()
    cards = {each["id"]: each for each in (await world.http.get("/v1/models")).json()["data"]}
    assert list(cards)[-2:] == ["both", nameless["id"]]
    assert (cards["both"]["root"], cards["both"]["parent"]) == (named["id"], "tiny")
    for name in ("both", named["id"], nameless["id"]):
        assert (await world.http.get(f"/v1/models/{name}")).json()["id"] == name
    response = await world.http.post("/v1/route", json={"model": "both", "prompt": PROMPT})
    assert (response.status_code, "answers itself" in response.text) == (400, True)


async def test_a_blend_answers_on_every_path(world):
    await store(world)
    body = {"model": "both", "prompt": PROMPT, "input": PROMPT, "messages": [{"role": "user", "content": PROMPT}]}
    for path in (*PATHS, *TOKEN_PATHS):
        response = await world.http.post(path, json=body)
        assert response.status_code == 200
        assert response.headers["x-moerge-experts"] == "count=0.6,shout=0.4"
        assert world.engine.asked[-1].body["model"].startswith("blend:cat@")


# Members change


async def test_a_retired_member_stops_it_with_the_reason(world):
    body = (await store(world)).json()
    await world.http.post("/v1/experts/shout/retire")
    response = await world.ask("both", PROMPT)
    assert response.status_code == 409
    error = response.json()["error"]
    assert error["code"] == "blend_unusable"
    assert "version 1 of its member 'shout' is retired" in error["message"]
    response = await world.ask(body["id"], PROMPT)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    shown = (await world.http.get("/v1/blends/both")).json()
    assert (shown["usable"], shown["problems"]) == (False, ["version 1 of its member 'shout' is retired"])
    assert "both" not in [each["id"] for each in (await world.http.get("/v1/models")).json()["data"]]
    assert (await world.http.get(f"/v1/models/{body['id']}")).status_code == 404
    await world.http.post("/v1/experts/shout/rollback")
    assert (await world.ask("both", PROMPT)).json()["model"] == body["id"]


async def test_a_new_version_is_not_taken_silently(world, adapters, register):
    body = (await store(world)).json()
    await asyncio.to_thread(register, world.registry, "shout", adapters[3], new_version=True)
    await world.service.refresh()
    response = await world.ask("both", PROMPT)
    assert "version 1 of its member 'shout' has given way to version 2" in response.json()["error"]["message"]
    again = (await store(world, replace=True)).json()
    assert again["digest"] != body["digest"]
    assert [each["version"] for each in again["members"]] == [1, 2]
    assert (await world.ask("both", PROMPT)).json()["model"] == again["id"]


async def test_requests_in_flight_finish(world, until):
    body = (await store(world)).json()
    world.engine.gate.clear()
    asked = asyncio.create_task(world.ask("both", PROMPT))
    await until(lambda: world.engine.waiting)
    await world.http.delete("/v1/blends/both")
    await world.http.post("/v1/experts/shout/retire")
    world.engine.gate.set()
    answer = await asked
    assert (answer.status_code, answer.json()["model"]) == (200, body["id"])


async def test_other_statistics_are_another_content(world):
    def measure(scale):
        for name in ("count", "shout"):
            adapter = Adapter(world.service.active(name).path)
            gram = {module: scale * torch.eye(adapter.shape(module)[1]).numpy() for module in adapter.modules}
            world.registry.set_tensors(name, None, "gram", gram)

    await asyncio.to_thread(measure, 1.0)
    assert (await store(world, operator="regmean")).status_code == 201
    assert (await world.ask("both", PROMPT)).status_code == 200
    await asyncio.to_thread(measure, 2.0)
    await world.service.refresh()
    response = await world.ask("both", PROMPT)
    assert response.status_code == 409
    assert "other statistics of its members" in response.json()["error"]["message"]
    assert not (await world.http.get("/v1/blends/both")).json()["usable"]
    assert (await store(world, operator="regmean", replace=True)).status_code == 201
    assert (await world.ask("both", PROMPT)).status_code == 200


async def test_another_limit_of_the_engine_is_another_content(serve):
    async with serve() as world:
        assert (await store(world)).status_code == 201
    async with serve(engine={"max_rank": 1}) as world:
        response = await world.ask("both", PROMPT)
        assert response.status_code == 409
        assert "another engine.max_rank" in response.json()["error"]["message"]
        body = (await store(world, replace=True)).json()
        assert (body["report"]["rank"], body["report"]["cut"]) == (1, 4)
        assert 0 < body["report"]["discarded"] < 1
        assert (await world.ask("both", PROMPT)).status_code == 200


async def test_blends_outlast_a_restart(serve):
    async with serve() as world:
        body = (await store(world)).json()
    async with serve() as world:
        assert (await world.ask("both", PROMPT)).json()["model"] == body["id"]


@pytest.mark.usefixtures("watchful")
async def test_a_blend_that_another_process_stored_is_noticed(serve, until):
    async with serve() as world:
        body = (await store(world)).json()
        found = await asyncio.to_thread(world.registry.blends.get, "both")
        await asyncio.to_thread(world.registry.blends.remove, "both")
        await until(lambda: not world.service.knows("both", None))
        await asyncio.to_thread(world.registry.blends.create, found.model_copy(update={"name": "twin"}))
        await until(lambda: world.service.knows("twin", None))
        assert (await world.ask("twin", PROMPT)).json()["model"] == body["id"]


# Tenants


@pytest.fixture
async def secret(world, tenants, adapters, register):
    """Ann's private expert `secret`, and her blend of it, `mine`."""
    await asyncio.to_thread(register, world.registry, "secret", adapters[3], owner="ann", visibility="private")
    await world.service.refresh()
    response = await store(world, "mine", {"count": 0.5, "secret": 0.5}, headers=tenants["ann"])
    assert response.status_code == 201, response.text
    return response.json()


async def test_a_blend_of_a_private_expert_is_private(world, tenants, secret):
    assert (secret["owner"], secret["visibility"]) == ("ann", "private")
    for tenant in ("ann", "operator"):
        assert (await world.ask("mine", PROMPT, headers=tenants[tenant])).status_code == 200
    assert (await world.http.get("/v1/blends", headers=tenants["bob"])).json()["data"] == []
    assert "mine" not in (await world.http.get("/v1/models", headers=tenants["bob"])).text


async def test_what_is_hidden_answers_as_what_does_not_exist(world, tenants, secret):
    bob = tenants["bob"]

    async def answers(name):
        yield await world.http.get(f"/v1/blends/{name}", headers=bob)
        yield await world.http.delete(f"/v1/blends/{name}", headers=bob)
        yield await world.http.get(f"/v1/models/{name}", headers=bob)
        yield await world.ask(name, PROMPT, headers=bob)
        yield await world.http.post("/v1/route", json={"model": name, "prompt": PROMPT}, headers=bob)
        yield await store(world, "x", {name: 1.0}, headers=bob)

    for hidden, nothing in (("mine", "nope"), (secret["id"], "blend:0123456789ab"), ("secret", "nope")):
        one = [each async for each in answers(hidden)]
        two = [each async for each in answers(nothing)]
        assert [each.status_code for each in one] == [404, 404, 404, 404, 404, 422]
        assert [(each.status_code, each.text.replace(hidden, nothing)) for each in one] == [
            (each.status_code, each.text) for each in two
        ]


async def test_only_its_owner_and_the_operator_change_it(world, tenants):
    ann, bob, operator = tenants["ann"], tenants["bob"], tenants["operator"]
    assert (await store(world, headers=ann)).json()["owner"] == "ann"
    assert (await world.ask("both", PROMPT, headers=bob)).status_code == 200, "it is public"
    response = await world.http.delete("/v1/blends/both", headers=bob)
    assert (response.status_code, response.json()["error"]["code"]) == (403, "not_owner")
    assert "already taken. Choose another name." in reasons(await store(world, headers=bob, replace=True))[0]
    assert (await store(world, headers=operator, replace=True, density=None, members=["count"])).status_code == 201
    assert (await world.http.delete("/v1/blends/both", headers=operator)).status_code == 200


async def test_a_member_that_becomes_private_takes_the_blend_with_it(world, tenants, adapters, register):
    await asyncio.to_thread(register, world.registry, "anns", adapters[3], owner="ann")
    await world.service.refresh()
    ann, bob = tenants["ann"], tenants["bob"]
    body = (await store(world, "bobs", {"count": 0.5, "anns": 0.5}, headers=bob)).json()
    assert (await world.ask("bobs", PROMPT, headers=ann)).status_code == 200
    await world.http.patch("/v1/experts/anns", json={"visibility": "private"}, headers=ann)
    response = await world.ask("bobs", PROMPT, headers=bob)
    assert response.status_code == 409
    assert "its member 'anns' is not registered any more" in response.json()["error"]["message"]
    assert (await world.ask(body["id"], PROMPT, headers=bob)).status_code == 404
    assert (await world.ask("bobs", PROMPT, headers=ann)).status_code == 404, "it has become private as well"
    assert (await world.ask("bobs", PROMPT, headers=tenants["operator"])).status_code == 200


async def test_storing_and_removing_need_the_scope_admin(world, tenants):
    token = await asyncio.to_thread(lambda: world.registry.keys.create("eve", {"infer"})[1])
    eve = {"authorization": f"Bearer {token}"}
    assert (await store(world, headers=tenants["ann"])).status_code == 201
    assert (await store(world, "x", headers=eve)).status_code == 403
    assert (await world.http.delete("/v1/blends/both", headers=eve)).status_code == 403
    assert (await world.http.get("/v1/blends/both", headers=eve)).status_code == 200
    assert (await world.ask("both", PROMPT, headers=eve)).status_code == 200
    for method, path in (("POST", ""), ("GET", ""), ("GET", "/both"), ("DELETE", "/both")):
        response = await world.http.request(method, f"/v1/blends{path}", json={"members": ["count"]})
        assert response.status_code == 401


async def test_the_licences_are_the_members(world, tenants, adapters, register):
    await asyncio.to_thread(register, world.registry, "free", adapters[3], licence="cc-by-nc-4.0")
    await world.service.refresh()
    body = (await store(world, "licensed", ["count", "free"], headers=tenants["ann"])).json()
    assert body["licence"] == "cc-by-nc-4.0"
    assert [(each["expert"], each["notes"]) for each in body["licences"]] == [
        ("free", ["non-commercial"]),
        ("count", []),
    ]


# What it says of itself


async def test_every_field_of_the_body_is_documented(world):
    schema = (await world.http.get("/openapi.json")).json()["components"]["schemas"]["Wanted"]
    page = (Path(__file__).parents[3] / "docs" / "api.md").read_text()
    table = page.partition("### `POST /v1/blends`")[2].partition("\n### ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert documented | {"density", "rank", "seed"} == set(schema["properties"])
    assert schema["properties"]["members"]["examples"]
