"""A running server follows what the router learns."""

from __future__ import annotations

import asyncio
import functools

import numpy as np
import pytest

from router.versions import Rating

REVERSE = "spell cherry backwards"


@pytest.fixture
def serve(serve):
    """A server that routes by retrieval, whatever the default is."""
    return functools.partial(serve, router={"method": "retrieval", "methods": {"retrieval": {}}})


pytestmark = pytest.mark.usefixtures("watchful")


def learn(world, *ratings):
    """A new version that knows these judgements of REVERSE."""
    router = world.service.router
    vectors = np.repeat(router.encoder.encode([REVERSE]), len(ratings), axis=0)
    return world.service.versions.save(ratings=ratings, vectors=vectors, encoder=router.encoder_id).number


async def answers(world):
    response = await world.ask("auto", REVERSE)
    assert response.status_code == 200
    return response.json()["model"]


async def test_a_promoted_version_is_served_without_a_restart_and_a_rollback_too(world, until):
    number = await asyncio.to_thread(learn, world, Rating(decision="dec-1", expert="reverse", score=0))
    assert await answers(world) == "reverse", "written is not promoted"
    asking = asyncio.create_task(keep_asking(world))
    await asyncio.to_thread(world.service.versions.promote, number)
    await until(lambda: world.service.router.learned.number == number)
    assert await answers(world) != "reverse", "it answered that badly"
    await asyncio.to_thread(world.service.versions.rollback)
    await until(lambda: world.service.router.learned.number == 0)
    assert await answers(world) == "reverse"
    asking.cancel()
    statuses = await asyncio.gather(asking, return_exceptions=True)
    assert isinstance(statuses[0], asyncio.CancelledError), "no request failed meanwhile"


async def keep_asking(world):
    while True:
        await answers(world)


async def test_registered_prototypes_do_not_take_in_what_was_learned(world, until):
    number = await asyncio.to_thread(learn, world, Rating(decision="dec-1", expert="shout", score=1))
    await asyncio.to_thread(world.service.versions.promote, number)
    await asyncio.to_thread(world.registry.update, "shout", description="Shouts.")  # drops its prototypes
    await until(lambda: world.service.router.learned.number == number)
    await until(lambda: world.service.generation == world.registry.generation())
    stored = await asyncio.to_thread(world.registry.prototypes, world.service.router.encoder_id)
    expert = world.service.active("shout")
    await until(lambda: len(world.service.router.library.prototypes[2]) == 3)
    assert stored[expert.id].shape[0] == 2


async def test_a_damaged_version_is_passed_over_and_ready_says_so(world, until, caplog):
    assert (await world.http.get("/ready")).json()["problems"] == []
    good = await asyncio.to_thread(learn, world, Rating(decision="dec-1", expert="reverse", score=0))
    await asyncio.to_thread(world.service.versions.promote, good)
    bad = await asyncio.to_thread(learn, world)
    await asyncio.to_thread(world.service.versions.promote, bad)
    await until(lambda: world.service.router.learned.number == bad)
    (world.service.versions.folder / f"{bad}.json").write_text("{")
    await world.service.refresh()
    body = (await world.http.get("/ready")).json()
    assert body["router"] == good
    assert len(body["problems"]) == 1
    assert f"The router file {bad}.json cannot be used" in body["problems"][0]
    assert f"Version {good} is used instead." in body["problems"][0]
    assert str(world.folder) not in body["problems"][0]
    assert caplog.text.count("cannot be used") == 1
    assert await answers(world) != "reverse"
