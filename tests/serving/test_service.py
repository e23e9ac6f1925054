"""What a running server keeps in step: the registry's changes, the engine's life, what is left behind."""

from __future__ import annotations

import asyncio
import logging

import pytest

from adapters_registry.errors import StoreFull
from adapters_registry.expert import State
from adapters_registry.registry import Registry

REVERSE = "spell cherry backwards"


async def test_what_another_process_registers_is_served(watchful, world, base, register, adapters, until):
    def elsewhere():
        with Registry.open(world.folder, base=base) as registry:
            register(registry, "translate", adapters[3], samples=["say banana in french", "say window in french"])

    await asyncio.to_thread(elsewhere)
    await until(lambda: world.service.active("translate"))
    assert (await world.ask("auto", "say cherry in french")).json()["model"] == "translate"


async def test_what_another_process_retires_is_no_longer_routed_to(watchful, world, base, until):
    def elsewhere():
        with Registry.open(world.folder, base=base) as registry:
            registry.retire("reverse")

    await asyncio.to_thread(elsewhere)
    await until(lambda: not world.service.active("reverse"))
    assert (await world.ask("auto", REVERSE)).json()["model"] == "tiny"
    assert (await world.ask("reverse", REVERSE)).status_code == 404


async def test_a_departed_version_is_unloaded_and_its_files_go(watchful, world, until):
    old = world.service.active("reverse")
    await world.ask("reverse", REVERSE)
    assert old.id in world.engine.shown
    await asyncio.to_thread(world.registry.remove, "reverse")
    await until(lambda: old.id not in world.engine.shown)
    await until(lambda: not old.path.exists())
    assert world.service.active("count").path.exists()


async def test_the_files_of_a_version_that_is_only_retired_stay(watchful, world, until):
    old = world.service.active("reverse")
    await world.ask("reverse", REVERSE)
    await asyncio.to_thread(world.registry.retire, "reverse")
    await until(lambda: old.id not in world.engine.shown)
    assert old.path.exists()
    await asyncio.to_thread(world.registry.promote, "reverse", old.version)
    await until(lambda: world.service.active("reverse"))
    assert (await world.ask("auto", REVERSE)).json()["model"] == "reverse"


async def test_the_files_of_a_removed_version_stay_while_it_answers(watchful, world, until):
    old = world.service.active("reverse")
    world.engine.gate.clear()
    call = world.chat("reverse", REVERSE)
    await until(lambda: world.engine.waiting)
    await asyncio.to_thread(world.registry.remove, "reverse")
    await until(lambda: old.id not in world.service._by_id)
    await asyncio.to_thread(world.registry.remove, "count")  # makes the collector run
    await until(lambda: len(world.service._by_id) == 1)
    assert old.path.exists()
    world.engine.gate.set()
    await call.done()
    assert (await call.next())["status"] == 200


async def test_a_version_that_comes_back_within_its_grace_is_not_unloaded(world, monkeypatch, until):
    monkeypatch.setattr("serving.service.WATCH", 0.01)
    old = world.service.active("reverse")
    await world.ask("reverse", REVERSE)
    await asyncio.to_thread(world.registry.retire, "reverse")
    await world.service.refresh()
    assert world.service.expert(old.id) == old.model_copy()  # still answers what was decided before
    await asyncio.to_thread(world.registry.promote, "reverse", 1)
    await world.service.refresh()
    monkeypatch.setattr("serving.service.GRACE", 0.0)
    await world.service._clear()
    assert old.id in world.engine.shown


async def test_an_engine_that_dies_is_started_again(watchful, world, until):
    await world.ask("reverse", REVERSE)
    world.engine.dead = True
    world.engine.fails_to_start = 1000
    await until(lambda: world.service.failure is not None)
    response = await world.http.get("/ready")
    assert response.status_code == 503
    assert "restarted" in response.json()["reason"]
    assert (await world.http.get("/health")).status_code == 200
    world.engine.fails_to_start = 0
    await until(lambda: world.service.failure is None)
    assert world.engine.starts == 2
    assert (await world.ask("auto", REVERSE)).json()["model"] == "reverse"  # loaded again by the new engine
    assert (await world.http.get("/ready")).status_code == 200


async def test_a_restart_that_fails_is_tried_again(watchful, world, until, caplog):
    world.engine.fails_to_start = 2
    world.engine.dead = True
    await until(lambda: world.engine.starts == 2)
    await until(lambda: world.service.failure is None)
    assert caplog.text.count("The engine did not start again: no memory") == 2
    assert world.fatal == []


async def test_a_first_start_that_fails_is_told_to_whoever_started_it(serve, until):
    async with serve(wait=False) as world:
        world.engine.fails_to_start = 1
        world.service.start(never, world.fatal.append)
        await until(lambda: world.fatal)
        assert str(world.fatal[0]) == "no memory"
        response = await world.ask("auto", REVERSE)
        assert response.status_code == 503
        assert "no memory" in response.json()["error"]["message"]


async def never():
    raise AssertionError("there is nothing to warm up")


async def test_a_registry_that_cannot_be_read_leaves_the_last_known_experts(
    watchful, world, until, caplog, monkeypatch
):
    read = world.registry.generation

    def fails():
        raise OSError("disk on fire")

    monkeypatch.setattr(world.registry, "generation", fails)
    await until(lambda: "disk on fire" in caplog.text)
    assert (await world.ask("auto", REVERSE)).json()["model"] == "reverse"
    monkeypatch.setattr(world.registry, "generation", read)
    await asyncio.to_thread(world.registry.retire, "reverse")
    await until(lambda: not world.service.active("reverse"))


async def test_clearing_that_fails_does_not_stop_the_watch(watchful, world, until, caplog, monkeypatch):
    collect = world.registry.collect

    def full(needed):
        monkeypatch.setattr(world.registry, "collect", collect)
        raise StoreFull(world.folder)

    monkeypatch.setattr(world.registry, "collect", full)
    await asyncio.to_thread(world.registry.remove, "reverse")
    await until(lambda: "No space left" in caplog.text)
    path = world.service.active("count").path
    await asyncio.to_thread(world.registry.remove, "count")
    await until(lambda: not path.exists())


async def test_prototypes_are_computed_once_and_kept_with_the_version(serve):
    async with serve() as world:
        key = world.service.router.encoder_id
        stored = await asyncio.to_thread(world.registry.prototypes, key)
        assert {each.partition("@")[0]: len(rows) for each, rows in stored.items()} == {
            "count": 2,
            "reverse": 2,
            "shout": 2,
        }
    async with serve(wait=False) as world:
        encoded = []
        encode = world.service.router.encoder.encode
        world.service.router.encoder.encode = lambda texts: encoded.extend(texts) or encode(texts)
        await world.service.refresh()
        assert encoded == []


async def test_refreshes_and_clearing_at_once_keep_the_books_right(watchful, world):
    async def change():
        for _ in range(5):
            await asyncio.to_thread(world.registry.retire, "reverse")
            await world.service.refresh()
            await asyncio.to_thread(world.registry.promote, "reverse", 1)
            await world.service.refresh()

    async def clear():
        for _ in range(50):
            await world.service._clear()
            await asyncio.sleep(0)

    await asyncio.gather(change(), clear(), clear())
    assert {each.name for each in world.service.experts(None)} == {"count", "reverse", "shout"}
    assert world.service._left == {}


async def test_work_that_nobody_waits_for_is_finished_before_the_end(serve):
    done = asyncio.Event()
    async with serve() as world:

        async def slow():
            for _ in range(20):
                await asyncio.sleep(0)
            done.set()

        world.service.spawn(slow())
    assert done.is_set()


async def test_work_that_fails_unseen_says_nothing_on_its_own(world, until, caplog):
    async def fails():
        raise StoreFull("somewhere")

    caplog.set_level(logging.ERROR)
    world.service.spawn(fails())
    await until(lambda: not world.service._work)
    assert "never retrieved" not in caplog.text


@pytest.mark.parametrize("state", [State.STAGED, State.QUARANTINED])
async def test_only_active_versions_are_served(world, register, adapters, state):
    await asyncio.to_thread(register, world.registry, "aside", adapters[3], state, samples=["purple monkey dishwasher"])
    await world.service.refresh()
    assert (await world.ask("auto", "purple monkey dishwasher")).json()["model"] == "tiny"
    assert (await world.ask("aside", "x")).status_code == 404
