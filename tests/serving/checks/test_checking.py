"""A proposed version, tested on a running server: what its report says, how it is kept, who may read it."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest
from blockbuster import blockbuster_ctx

from adapters_registry.errors import VersionNotFound
from adapters_registry.expert import State
from serving.checks.run import to_check
from serving.engine import EngineUnavailable
from tests.serving.checks.conftest import FRENCH, TASKS, Proposals, names, rows, scaled, section, well_informed


def passed(report):
    return {each["name"]: each["passed"] for each in report["sections"]}


async def test_a_good_new_expert_passes_with_its_figures(proposals):
    await proposals.stage(description="French.", licence="MIT", tags=("fr",), training_data=("none",))
    report = await proposals.check()
    assert {name for name, fine in passed(report).items() if not fine} == {"declared"}
    assert section(report, "declared")["detail"] == "5 samples; 10 to 20 are usual"
    own = section(report, "own_task")
    assert (own["figure"], own["limit"]) == (1.0, 0.0)
    assert own["detail"].startswith("exact answers to 5 of its own samples: this version 100%; the base model 0%")
    assert "takes 0 of 30 held-out samples" in section(report, "confusion")["detail"]
    assert "of its own 5 samples it would get 5" in section(report, "confusion")["detail"]
    assert report["ruling"] == {
        "passed": True,
        "enforce": "warn",
        "required": ["own_task", "regression", "duplicates", "loudness", "triggers"],
        "reasons": [],
    }
    assert "training data" in report["notes"][0]
    assert (report["state"], report["method"], report["stale"]) == ("staged", "retrieval", False)


async def test_nothing_is_routed_to_it_and_nothing_of_it_stays_loaded(proposals):
    world = proposals.world
    expert = await proposals.stage()
    generation = world.registry.generation()
    await proposals.check()
    assert world.service.active("french") is None
    assert expert.id not in world.engine.loaded()
    assert world.registry.generation() == generation
    assert world.registry.get("french", 1).state is State.STAGED


async def test_one_that_answers_wrongly_adds_nothing(proposals):
    await proposals.stage()
    proposals.world.engine.says["french"] = names("wrong")
    proposals.world.engine.says["tiny"] = names("french")  # the base model knows it already
    own = section(await proposals.check(), "own_task")
    assert (own["passed"], own["figure"]) == (False, -1.0)
    assert "a gain of at least +0% is asked of it" in own["detail"]


async def test_a_new_version_is_measured_against_the_one_that_serves(proposals, many_adapters):
    world = proposals.world
    first = await proposals.stage()
    await world.http.post("/v1/experts/french/promote", json={"version": 1})
    second = await proposals.stage(folder=many_adapters[7])
    half = {row["prompt"] for row in rows(FRENCH, "french")[:2]}
    world.engine.says[first.id] = names("french")
    world.engine.says[second.id] = lambda prompt: names("french")(prompt) if prompt in half else "no"
    report = await proposals.check()
    own = section(report, "own_task")
    assert (report["version"], own["passed"], own["figure"]) == (2, False, -0.6)
    assert "version 1, active 100%" in own["detail"]
    assert {"who": "of these, french", "samples": 5, "score": 1.0} in own["rows"]
    assert section(report, "duplicates")["rows"][0]["expert"] != "french"


async def test_whose_prompts_it_takes_and_answers_worse_is_named(proposals):
    """More prompts for the task of `reverse`, and it answers none of them as `reverse` does."""
    await proposals.stage(samples=rows(TASKS["reverse"], "french", "abcdefghijkl"))
    report = await proposals.check()
    confusion, regression = section(report, "confusion"), section(report, "regression")
    assert (confusion["passed"], regression["passed"]) == (False, False)
    assert confusion["rows"][0]["expert"] == regression["rows"][0]["expert"] == "reverse"
    lost = confusion["rows"][0]["to_this_version"]
    assert confusion["figure"] == regression["figure"] == pytest.approx(lost / 5)
    assert regression["rows"][0] == {
        "expert": "reverse",
        "samples": 5,
        "moved": lost,
        "right_before": lost,
        "right_after": 0,
        "change": pytest.approx(-lost / 5),
    }
    assert f"worse for 'reverse' ({lost / 5:.0%} of its samples)" in regression["detail"]
    assert [each["code"] for each in report["ruling"]["reasons"]] == ["regression"]


async def test_one_that_answers_them_as_well_changes_hands_but_nothing_gets_worse(proposals):
    await proposals.stage(samples=rows(TASKS["reverse"], "reverse", "abcdefghijkl"))
    proposals.world.engine.says["french"] = names("reverse")
    report = await proposals.check()
    assert not section(report, "confusion")["passed"]
    assert section(report, "regression")["passed"]
    assert section(report, "regression")["figure"] == 0.0


async def test_a_scaled_copy_is_a_duplicate_and_too_loud(proposals, many_adapters, tmp_path):
    await proposals.stage(folder=scaled(many_adapters[2], tmp_path / "loud", 10))
    report = await proposals.check()
    duplicates, loudness = section(report, "duplicates"), section(report, "loudness")
    assert (duplicates["passed"], duplicates["figure"]) == (False, pytest.approx(1, abs=1e-4))
    assert "most like 'first'" in duplicates["detail"]
    assert not loudness["passed"]
    assert loudness["figure"] > 10
    assert "10 times the median" in loudness["detail"] or "9.9 times" in loudness["detail"]


async def test_one_that_changes_neutral_prompts_more_than_its_peers_is_flagged(proposals):
    proposals.world.engine.shifts["french"] = 4.0
    await proposals.stage()
    triggers = section(await proposals.check(), "triggers")
    assert (triggers["passed"], triggers["figure"]) == (False, pytest.approx((1.0 - 0.0625) / 0.05))
    assert "by 1 nats; its 6 peers by 0.0625 in the median" in triggers["detail"]


async def test_what_peers_do_on_neutral_prompts_is_asked_once(proposals):
    await proposals.stage()
    engine = proposals.world.engine
    first = await proposals.check()
    asked = len(engine.asked)
    engine.asked.clear()
    second = await proposals.check()
    assert len(engine.asked) < asked / 2
    assert first["sections"] == second["sections"]


async def test_without_answers_it_says_that_it_measured_nothing(proposals):
    await proposals.stage(samples=tuple({"prompt": each["prompt"]} for each in rows(FRENCH, "")))
    own = section(await proposals.check(), "own_task")
    assert (own["passed"], own["figure"]) == (None, None)
    assert own["detail"] == "not measured: no answers among its samples"


async def test_answers_that_nobody_gives_exactly_measure_nothing(proposals):
    await proposals.stage()
    proposals.world.engine.says["french"] = names("almost")
    own = section(await proposals.check(), "own_task")
    assert own["passed"] is None
    assert "nobody gives any of the 5 answers exactly" in own["detail"]


async def test_peers_that_the_engine_does_not_load_are_left_out(proposals):
    await proposals.stage()
    proposals.world.engine.refuses |= {"count", "double"}
    triggers = section(await proposals.check(), "triggers")
    assert "4 peers are too few" in triggers["detail"]
    assert triggers["passed"]


async def test_the_active_version_can_be_checked_and_is_compared_with_the_others_only(proposals):
    report = await proposals.check("reverse")
    assert (report["version"], report["state"]) == (1, "active")
    assert section(report, "own_task")["figure"] == 1.0
    assert "reverse" not in json.dumps(section(report, "duplicates"))
    assert "reverse@" in "".join(proposals.world.engine.loaded()), "it goes on serving"


async def test_an_empty_registry_has_nobody_to_compare_with(serve, adapters):
    async with serve(empty=True) as world:
        well_informed(world)
        proposals = Proposals(world, adapters[0])
        await proposals.stage()
        report = await proposals.check()
        assert passed(report) | {"declared": None} == dict.fromkeys(passed(report), True) | {"declared": None}


# Kept with the version


async def test_the_report_is_there_after_a_restart_and_says_when_it_is_stale(running, many_adapters):
    async with running() as world:
        proposals = Proposals(well_informed(world), many_adapters[6])
        await proposals.stage()
        made = await proposals.check()
    async with running() as world:
        report = (await world.http.get("/v1/experts/french/check")).json()
        assert report == made
        await asyncio.to_thread(world.registry.retire, "shout")
        await world.service.refresh()
        report = (await world.http.get("/v1/experts/french/check")).json()
        assert (report["stale"], report["current_generation"]) == (True, made["generation"] + 1)


async def test_without_a_report_it_says_how_to_make_one(proposals):
    await proposals.stage()
    response = await proposals.world.http.get("/v1/experts/french/check")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "check_not_found")
    assert "moerge expert check french --version 1" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/experts/nobody/check", "/v1/experts/reverse/check?version=9"])
async def test_what_does_not_exist_cannot_be_checked(proposals, path):
    for method in ("GET", "POST"):
        response = await proposals.world.http.request(method, path)
        assert response.status_code == 404
        assert response.json()["error"]["code"] in ("expert_not_found", "version_not_found")


async def test_a_report_of_another_release_is_none(proposals):
    expert = await proposals.stage()
    await asyncio.to_thread(proposals.world.registry.measured.put, expert, "report", {"old": True})
    assert (await proposals.world.http.get("/v1/experts/french/check")).status_code == 404


async def test_an_engine_that_dies_leaves_no_report(proposals, until):
    engine = proposals.world.engine
    await proposals.stage()
    engine.gate.clear()
    task = asyncio.create_task(proposals.world.http.post("/v1/experts/french/check"))
    await until(lambda: engine.waiting, 60)
    engine.dead = True
    engine.gate.set()
    response = await task
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_unavailable")
    assert (await proposals.world.http.get("/v1/experts/french/check")).status_code == 404


async def test_one_that_the_engine_does_not_load_is_told_so(proposals):
    await proposals.stage()
    proposals.world.engine.refuses.add("french")
    response = await proposals.world.http.post("/v1/experts/french/check")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "expert_load_failed")


async def test_a_version_that_is_removed_meanwhile_leaves_nothing(proposals, until):
    world = proposals.world
    expert = await proposals.stage()
    world.engine.gate.clear()
    task = asyncio.create_task(world.http.post("/v1/experts/french/check"))
    await until(lambda: world.engine.waiting, 60)
    await asyncio.to_thread(world.registry.remove, "french")
    world.engine.gate.set()
    response = await task
    assert (response.status_code, response.json()["error"]["code"]) == (404, "version_not_found")
    assert await asyncio.to_thread(world.registry.measured.get, expert, "report") is None


async def test_it_goes_on_when_its_client_leaves(proposals, until):
    world = proposals.world
    await proposals.stage()
    world.engine.gate.clear()
    call = world.call("/v1/experts/french/check", None, content=b"")
    await until(lambda: world.engine.waiting, 60)
    call.hang_up()
    call.task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await call.task
    world.engine.gate.set()
    async with asyncio.timeout(60):
        while (await world.http.get("/v1/experts/french/check")).status_code != 200:
            await asyncio.sleep(0.01)


async def test_a_stop_ends_a_check_that_is_waiting_for_answers(running, many_adapters, until):
    async with running() as world:
        proposals = Proposals(well_informed(world), many_adapters[6])
        expert = await proposals.stage()
        world.engine.gate.clear()
        task = asyncio.create_task(world.service.checks.run(expert, lambda *_: None))
        await until(lambda: world.engine.waiting, 60)
        world.service.calibration.stopping = True
        world.engine.gate.set()
        with pytest.raises(EngineUnavailable, match="stopping"):
            await task


async def test_progress_is_told_and_the_report_ends_the_stream(proposals):
    await proposals.stage()
    response = await proposals.world.http.post("/v1/experts/french/check", params={"stream": "true"})
    blocks = [block.split("\n") for block in response.text.split("\n\n") if block and not block.startswith(":")]
    events = [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]
    stages = [data["stage"] for name, data in events if name == "progress"]
    assert list(dict.fromkeys(stages)) == ["wait", "weights", "route", "ask", "neutral", "done"]
    assert events[-1][0] == "check"
    assert events[-1][1] == (await proposals.world.http.get("/v1/experts/french/check")).json()


async def test_the_event_loop_is_never_blocked(proposals):
    await proposals.stage()
    with blockbuster_ctx(["serving", "router", "adapters_registry"]):
        await proposals.check()
        assert (await proposals.world.http.get("/v1/experts/french/check")).status_code == 200


async def test_two_checks_take_turns(proposals):
    await proposals.stage()
    one, other = await asyncio.gather(proposals.check(), proposals.check("reverse"))
    assert (one["name"], other["name"]) == ("french", "reverse")


# Which version is meant


async def test_the_latest_staged_version_is_meant_then_the_active_one(proposals, many_adapters):
    registry = proposals.world.registry
    await proposals.stage("reverse")
    await proposals.stage("reverse", many_adapters[7])
    versions = await asyncio.to_thread(registry.versions, "reverse")
    assert to_check(versions, None).version == 3
    assert to_check(versions, 2).version == 2
    assert to_check(versions[:1], None).version == 1
    with pytest.raises(VersionNotFound, match=r"no version 9\. Versions: 1 \(active\), 2 \(staged\)"):
        to_check(versions, 9)
    retired = [versions[0].model_copy(update={"state": State.RETIRED})]
    with pytest.raises(VersionNotFound, match="no active version"):
        to_check(retired, None)


# Tenants


@pytest.fixture
async def tenants(proposals):
    """Keys of ann, bob and the operator; `reverse` is bob's own, and ann proposes a copy of it."""
    world, headers = proposals.world, {}
    for owner in ("ann", "bob", "operator"):
        _, token = await asyncio.to_thread(world.registry.keys.create, owner, ["infer", "admin"])
        headers[owner] = {"authorization": f"Bearer {token}"}
    await world.service.refresh()
    await asyncio.sleep(0)
    world.service.authenticator._needed.clear()
    return headers


async def private_of_bob(world, many_adapters, tmp_path):
    """An expert `secret` of bob's, for the very prompts that ann's will be for."""
    proposals = Proposals(world, many_adapters[7])
    await proposals.stage("secret", samples=rows(FRENCH, "secret"), owner="bob", visibility="private")
    await asyncio.to_thread(world.registry.promote, "secret", 1)
    await world.service.refresh()


@pytest.mark.parametrize("visibility", ["public", "private"])
async def test_a_report_names_nobody_whom_its_owner_may_not_see(
    proposals, tenants, many_adapters, tmp_path, visibility
):
    world = proposals.world
    world.engine.says["secret"] = names("secret")
    await private_of_bob(world, many_adapters, tmp_path)
    await proposals.stage(folder=scaled(many_adapters[7], tmp_path / "copy", 2), owner="ann", visibility=visibility)
    for who in ("ann", "operator"):
        response = await world.http.post("/v1/experts/french/check", headers=tenants[who])
        assert response.status_code == 200
        assert "secret" not in response.text
        assert section(response.json(), "duplicates")["passed"], "ann is not told that somebody has the same"
        assert section(response.json(), "confusion")["figure"] == 0
    for method in ("GET", "POST"):
        response = await world.http.request(method, "/v1/experts/french/check", headers=tenants["bob"])
        expected = (403, "not_owner") if visibility == "public" else (404, "expert_not_found")
        assert (response.status_code, response.json()["error"]["code"]) == expected
    assert (await world.http.get("/v1/experts/french/check", headers=tenants["ann"])).status_code == 200


async def test_a_check_needs_an_admin_s_key_and_reading_it_the_owner_s(proposals, tenants):
    world = proposals.world
    await proposals.stage(owner="ann")
    _, token = await asyncio.to_thread(world.registry.keys.create, "ann", ["infer"])
    reader = {"authorization": f"Bearer {token}"}
    assert (await world.http.post("/v1/experts/french/check", headers=reader)).status_code == 403
    assert (await world.http.get("/v1/experts/french/check", headers=reader)).status_code == 404
    assert (await world.http.get("/v1/experts/french/check")).status_code == 401
