"""Which checks a staged version must pass before it is promoted."""

from __future__ import annotations

import asyncio
import json

import pytest
from pydantic import ValidationError

from adapters_registry.expert import State
from serving.checks.policy import ruling
from serving.checks.report import Report, Section
from serving.config import CheckSettings
from tests.serving.checks.conftest import Proposals, names, well_informed


def report(**passed):
    sections = tuple(Section(name=name, passed=fine, detail=f"{name} it is") for name, fine in passed.items())
    return Report(name="a", version=1, digest="d", generation=1, method="fusion", sections=sections)


@pytest.mark.parametrize(
    ("passed", "against"),
    [
        ({"own_task": True, "loudness": True}, []),
        ({"own_task": True, "loudness": True, "declared": False}, []),
        ({"own_task": False, "loudness": True}, ["own_task: own_task it is"]),
        ({"own_task": None, "loudness": True}, ["own_task: own_task it is"]),
        ({"loudness": False}, ["own_task: it was not checked", "loudness: loudness it is"]),
    ],
)
def test_what_is_required_has_to_be_passed_and_the_rest_informs(passed, against):
    found = ruling(report(**passed), CheckSettings(require=("own_task", "loudness")))
    assert [each.message for each in found.reasons] == against
    assert found.passed == (not against)


def test_nothing_required_is_nothing_to_fail():
    assert ruling(report(own_task=False), CheckSettings(require=())).passed


def test_an_unknown_check_cannot_be_required():
    with pytest.raises(ValidationError, match="own_task"):
        CheckSettings(require=("own-task",))


async def promote(world, version=1, **more):
    return await world.http.post("/v1/experts/french/promote", json={"version": version, **more})


def last_promotion(world):
    return [event.detail for event in world.registry.events("french") if event.action == "promote"][-1]


@pytest.fixture
def strict(running, many_adapters):
    """A server that refuses what was not checked."""

    def start(**checks):
        return running(checks={"enforce": "always", **checks})

    return start


async def test_what_was_not_checked_is_not_promoted(strict, many_adapters):
    async with strict() as world:
        proposals = Proposals(well_informed(world), many_adapters[6])
        await proposals.stage()
        refused = await promote(world)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "check_required")
        assert "moerge expert check french --version 1" in refused.json()["error"]["message"]
        assert world.service.active("french") is None
        assert (await proposals.check())["ruling"]["passed"]
        promoted = await promote(world)
        assert (promoted.status_code, promoted.json()["warnings"]) == (200, [])
        assert (await world.ask("auto", "say in french tower")).json()["model"] == "french"
        assert last_promotion(world) == {}


async def test_what_failed_is_not_promoted_but_by_force_which_is_recorded(strict, many_adapters):
    async with strict() as world:
        proposals = Proposals(well_informed(world), many_adapters[6])
        await proposals.stage()
        world.engine.says["french"], world.engine.shifts["french"] = names("wrong"), 4.0
        await proposals.check()
        refused = await promote(world)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (409, "check_failed")
        assert [each["code"] for each in error["reasons"]] == ["own_task", "triggers"]
        assert all(each["message"] in error["message"] for each in error["reasons"])
        assert (await asyncio.to_thread(world.registry.get, "french", 1)).state is State.STAGED
        forced = await promote(world, force=True)
        assert forced.status_code == 200
        assert forced.json()["warnings"] == [each["message"] for each in error["reasons"]]
        assert last_promotion(world) == {"forced": True, "against": forced.json()["warnings"]}


async def test_a_policy_that_warns_promotes_and_says_so(running, many_adapters):
    async with running() as world:
        proposals = Proposals(well_informed(world), many_adapters[6])
        await proposals.stage()
        promoted = await promote(world)
        assert promoted.status_code == 200
        assert promoted.json()["warnings"] == ["it has not been checked"]
        assert last_promotion(world) == {"forced": False, "against": ["it has not been checked"]}


async def test_a_policy_that_never_asks_says_nothing(running, many_adapters):
    async with running(checks={"enforce": "never"}) as world:
        await Proposals(well_informed(world), many_adapters[6]).stage()
        assert (await promote(world)).json()["warnings"] == []
        assert last_promotion(world) == {}


async def test_only_staged_versions_are_proposals(strict, many_adapters):
    """Registering as before, going back, and taking up what served already ask for no check."""
    async with strict() as world:
        about = {"name": "french", "samples": ["say in french banana"], "new_version": True}
        for folder in many_adapters[6:8]:
            files = [("files", (path.name, path.read_bytes())) for path in folder.iterdir() if path.name != "README.md"]
            added = await world.http.post("/v1/experts", data={"expert": json.dumps(about)}, files=files)
            assert (added.status_code, added.json()["state"]) == (201, "active"), added.text
        assert (await promote(world, 1)).status_code == 200
        assert (await world.http.post("/v1/experts/french/rollback")).json()["version"] == 2


async def test_what_the_checks_say_is_not_told_to_other_tenants(strict, many_adapters):
    async with strict() as world:
        await Proposals(well_informed(world), many_adapters[6]).stage(owner="ann")
        _, token = await asyncio.to_thread(world.registry.keys.create, "bob", ["admin"])
        headers = {"authorization": f"Bearer {token}"}
        world.service.authenticator._needed.clear()
        refused = await world.http.post("/v1/experts/french/promote", json={"version": 1}, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "not_owner")


async def test_vllm_s_way_to_load_an_adapter_is_no_way_around_it(strict, adapters):
    async with strict() as world:
        await Proposals(well_informed(world), adapters[3]).stage()
        body = {"lora_name": "french", "lora_path": str(adapters[3])}
        refused = await world.http.post("/v1/load_lora_adapter", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "check_required")
        assert world.service.active("french") is None
