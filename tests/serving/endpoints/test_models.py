"""`/v1/models`: everything that can stand in `model`."""

from __future__ import annotations

from router.methods import SERVED


async def test_everything_that_can_be_asked_for_is_listed(world):
    body = (await world.http.get("/v1/models")).json()
    assert body["object"] == "list"
    routed = ["auto", *(f"auto:{name}" for name in SERVED)]
    assert [each["id"] for each in body["data"]] == [*routed, "tiny", "count", "reverse", "shout"]
    for each in body["data"]:
        response = await world.ask(each["id"], "spell cherry backwards")
        assert response.status_code == 200, each


async def test_experts_have_the_base_model_as_parent(world):
    cards = {each["id"]: each for each in (await world.http.get("/v1/models")).json()["data"]}
    assert cards["tiny"]["parent"] is None
    assert cards["reverse"]["parent"] == "tiny"
    assert cards["reverse"]["root"] == world.service.active("reverse").id
    assert cards["reverse"]["created"] > 1_700_000_000
    assert all(each["object"] == "model" for each in cards.values())


async def test_one_can_be_looked_up(world):
    for name in ("auto", "auto:retrieval", "tiny", "reverse"):
        assert (await world.http.get(f"/v1/models/{name}")).json()["id"] == name


async def test_what_is_not_served_is_openai_s_404(world):
    for name in ("gpt-4", "org/name", "auto:phatgoose"):
        response = await world.http.get(f"/v1/models/{name}")
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "model_not_found"


async def test_an_empty_registry_serves_the_base_model(serve):
    async with serve(empty=True) as world:
        assert [each["id"] for each in (await world.http.get("/v1/models")).json()["data"]][-1] == "tiny"
        assert (await world.ask("auto", "anything")).json()["model"] == "tiny"
