"""From a proposal to an expert in service: whole or absent, and tried on the engine first."""

from __future__ import annotations

import asyncio
import math

import pytest

from adapters_registry.errors import ExpertRefused, StoreFull
from adapters_registry.expert import State
from adapters_registry.proposal import FolderSource, HubSource, Proposal
from serving.engine import EngineUnavailable
from serving.registration import difference, has_source, register, sync_manifest

SAMPLES = [{"prompt": "say banana in french"}, {"prompt": "say window in french"}]


def quiet(stage, fraction):
    """Nobody is told."""


@pytest.fixture
def proposal(adapters):
    return Proposal(name="translate", source=FolderSource(path=adapters[3]), samples=SAMPLES)


def everything(world):
    """What a failed registration must not change."""
    registry = world.registry
    return (registry.experts(states=tuple(State)), registry.store.digests(), world.engine.loaded())


async def test_an_expert_is_tried_embedded_and_in_service_at_once(world, proposal):
    stages = []
    expert = await register(world.service, proposal, lambda stage, fraction: stages.append(stage))
    assert expert.state is State.ACTIVE
    assert list(dict.fromkeys(stages)) == ["fetch", "validate", "store", "try", "embed", "done"]
    assert [(check.name, check.passed, check.value) for check in expert.checks] == [
        ("behaviour", True, 0.25),
        ("takeover", True, 0.0),
    ]
    stored = world.registry.prototypes(world.service.router.encoder_id, [expert.id])
    assert stored[expert.id].shape == (2, 64)
    assert (await world.ask("auto", "say cherry in french")).json()["model"] == "translate"


async def test_the_check_asks_the_expert_s_own_samples_of_both(world, proposal):
    await register(world.service, proposal, quiet)
    asked = [(each.body["model"], each.body["prompt"]) for each in world.engine.asked]
    expert = world.service.active("translate")
    prompts = [each["prompt"] for each in SAMPLES]
    assert sorted(asked) == sorted((model, prompt) for prompt in prompts for model in ("tiny", expert.id))


async def test_an_expert_without_samples_is_asked_neutral_questions(world, proposal):
    expert = await register(world.service, proposal.model_copy(update={"samples": ()}), quiet)
    assert expert.checks[0].passed
    assert len(world.engine.asked) == 8


async def test_an_adapter_that_changes_nothing_is_quarantined_with_the_figure(world, proposal):
    world.engine.inert.add("translate")
    expert = await register(world.service, proposal, quiet)
    assert expert.state is State.QUARANTINED
    assert expert.checks[0].value == 0.0
    assert expert.checks[0].limit == 1e-3
    assert "by up to 0 nats on 2 prompts" in expert.reasons[0]
    assert (await world.ask("translate", "x")).status_code == 404
    assert expert.id not in world.engine.loaded()


async def test_an_adapter_that_answers_nan_is_quarantined(world, proposal):
    world.engine.broken.add("translate")
    expert = await register(world.service, proposal, quiet)
    assert expert.state is State.QUARANTINED
    assert expert.checks[0].value is None
    assert "nan" in expert.checks[0].detail


async def test_an_adapter_that_the_engine_does_not_take_leaves_nothing(world, proposal):
    before = everything(world)
    world.engine.refuses.add("translate")
    with pytest.raises(ExpertRefused) as refused:
        await register(world.service, proposal, quiet)
    assert refused.value.codes == {"engine_refused"}
    assert "it is not for me" in str(refused.value)
    assert everything(world) == before


async def test_an_engine_that_dies_while_it_tries_leaves_nothing(world, proposal, until):
    before = everything(world)
    world.engine.gate.clear()
    task = asyncio.create_task(register(world.service, proposal, quiet))
    await until(lambda: world.engine.waiting == 4)
    world.engine.dead = True
    world.engine.gate.set()
    with pytest.raises(EngineUnavailable):
        await task
    assert everything(world) == before


async def test_without_an_engine_nothing_is_even_fetched(serve, proposal):
    async with serve(wait=False) as world:
        with pytest.raises(EngineUnavailable, match="starting"):
            await register(world.service, proposal, quiet)


@pytest.mark.parametrize("step", ["prepare", "commit"])
async def test_a_full_disk_leaves_nothing(world, proposal, monkeypatch, step):
    before = everything(world)

    def full(*args, **options):
        raise StoreFull(world.folder)

    monkeypatch.setattr(world.registry, step, full)
    with pytest.raises(StoreFull):
        await register(world.service, proposal, quiet)
    assert everything(world) == before


async def test_an_encoder_that_fails_leaves_nothing(world, proposal, monkeypatch):
    before = everything(world)

    def fails(texts):
        raise ValueError("cannot read this")

    monkeypatch.setattr(world.service.router.encoder, "encode", fails)
    with pytest.raises(Exception, match="cannot read this"):
        await register(world.service, proposal, quiet)
    assert everything(world) == before


async def test_a_staged_version_waits_aside(world, proposal):
    expert = await register(world.service, proposal, quiet, stage=True)
    assert expert.state is State.STAGED
    assert expert.id not in world.engine.loaded()
    assert world.service.active("translate") is None


async def test_of_two_registrations_of_one_name_one_is_refused(world, proposal, adapters):
    other = proposal.model_copy(update={"source": FolderSource(path=adapters[3]), "name": "translate"})
    results = await asyncio.gather(
        register(world.service, proposal, quiet), register(world.service, other, quiet), return_exceptions=True
    )
    (refused,) = [each for each in results if isinstance(each, ExpertRefused)]
    assert refused.codes <= {"name_taken", "content_registered"}
    assert [each.name for each in world.registry.experts()].count("translate") == 1
    assert (await world.ask("translate", "x")).status_code == 200


async def test_a_prompt_that_does_not_suit_the_model_is_left_out_of_the_check(world, proposal, monkeypatch):
    whole = world.engine._app

    async def picky(scope, receive, send):
        first = await receive()
        if b"banana" in first["body"]:
            await send({"type": "http.response.start", "status": 400, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})
            return
        messages = [first]

        async def again():
            return messages.pop() if messages else await receive()

        await whole(scope, again, send)

    monkeypatch.setattr(world.engine, "_app", picky)
    assert (await register(world.service, proposal, quiet)).state is State.ACTIVE


# Whose samples it takes


@pytest.fixture
def everybody(world):
    """The samples of all experts there are."""
    return tuple(sample for expert in world.registry.experts() for sample in expert.samples)


async def test_an_expert_with_everybody_s_prompts_is_quarantined_as_a_takeover(world, proposal, everybody):
    expert = await register(world.service, proposal.model_copy(update={"samples": everybody}), quiet)
    assert expert.state is State.QUARANTINED
    check = expert.checks[1]
    assert (check.name, check.passed, check.value, check.limit) == ("takeover", False, 1.0, 0.25)
    assert expert.reasons == (check.detail,)
    assert "'reverse' (of 2 samples 2 are its own too)" in check.detail
    assert (await world.ask("auto", "spell cherry backwards")).json()["model"] == "reverse"
    await asyncio.to_thread(world.registry.promote, "translate", 1, force=True)
    await world.service.refresh()
    assert world.service.active("translate") is not None


async def test_an_expert_for_the_same_task_as_another_is_told_and_serves(world, proposal):
    twin = proposal.model_copy(update={"samples": world.service.active("reverse").samples})
    expert = await register(world.service, twin, quiet)
    assert expert.state is State.ACTIVE
    assert expert.checks[1].passed
    assert "'reverse'" in expert.checks[1].detail


async def test_what_somebody_keeps_private_is_not_told_to_others(world, proposal, everybody):
    await asyncio.to_thread(world.registry.update, "reverse", visibility="private")
    await world.service.refresh()
    expert = await register(world.service, proposal.model_copy(update={"samples": everybody, "owner": "ann"}), quiet)
    assert "reverse" not in expert.checks[1].detail
    assert not expert.checks[1].passed  # the two that ann sees are enough


# The figure


def test_the_figure_is_the_largest_change_before_the_answers_part():
    base = [("a", {"a": -1.0, "b": -2.0}), ("c", {"c": -0.5}), ("d", {"d": -1.0})]
    assert difference(base, base) == 0
    tried = [("a", {"a": -1.25, "b": -2.0}), ("c", {"c": -0.6}), ("d", {"d": -1.0})]
    assert difference(base, tried) == pytest.approx(0.25)


def test_another_answer_counts_by_how_much_less_likely_the_first_became():
    base = [("a", {"a": -1.0, "b": -2.0}), ("c", {"c": -0.5})]
    tried = [("b", {"b": -0.5, "a": -3.0}), ("z", {"z": -100.0})]
    assert difference(base, tried) == pytest.approx(2.0)
    assert difference(base, [("b", {"b": -0.1, "q": -6.0})]) == pytest.approx(5.0)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_no_number_does_not_pass(broken):
    assert not math.isfinite(difference([("a", {"a": -1.0})], [("a", {"a": broken})]))
    assert not math.isfinite(difference([("a", {"a": -1.0})], [("b", {"a": broken, "b": 0.0})]))


def test_no_answers_are_no_difference():
    assert difference([], []) == 0


# Manifests


async def sync(world, *proposals):
    told = []
    await sync_manifest(world.service, proposals, lambda position, proposal, outcome: told.append(outcome))
    return told


async def test_a_manifest_registers_what_is_missing_and_keeps_what_is_there(world, proposal, adapters):
    known = Proposal(name="reverse", source=FolderSource(path=adapters[1]))
    samples = world.service.active("reverse").samples
    known = known.model_copy(update={"samples": samples})
    assert await sync(world, known, proposal) == ["kept", "active"]
    assert await sync(world, known, proposal) == ["kept", "kept"]
    assert world.service.active("translate").version == 1


async def test_new_content_in_a_manifest_is_a_new_version(world, adapters):
    changed = Proposal(name="reverse", source=FolderSource(path=adapters[3]), samples=SAMPLES)
    assert await sync(world, changed) == ["active"]
    assert world.service.active("reverse").version == 2


async def test_new_samples_in_a_manifest_are_routed_by(world, adapters):
    known = Proposal(name="reverse", source=FolderSource(path=adapters[1]), samples=SAMPLES)
    assert await sync(world, known) == ["kept"]
    assert (await world.ask("auto", "say cherry in french")).json()["model"] == "reverse"


async def test_one_bad_expert_in_a_manifest_does_not_stop_the_others(world, proposal, tmp_path):
    bad = Proposal(name="bad", source=FolderSource(path=tmp_path / "nowhere"))
    told = await sync(world, bad, proposal)
    assert "nowhere" in told[0]
    assert told[1] == "active"


async def test_what_the_operator_retired_stays_retired(world, adapters):
    await asyncio.to_thread(world.registry.retire, "reverse")
    await world.service.refresh()
    known = Proposal(name="reverse", source=FolderSource(path=adapters[1]))
    assert await sync(world, known) == ["kept"]
    assert world.service.active("reverse") is None


async def test_content_that_another_name_has_is_not_called_kept(world, adapters):
    told = await sync(world, Proposal(name="mirror", source=FolderSource(path=adapters[1])))
    assert "registered already, as 'reverse' version 1" in told[0]


@pytest.mark.parametrize(
    ("source", "same"),
    [
        (HubSource(repo="org/a"), True),
        (HubSource(repo="org/a", revision="abc"), True),
        (HubSource(repo="org/a", revision="def"), False),
        (HubSource(repo="org/b"), False),
        (HubSource(repo="org"), False),
        (HubSource(repo="org/a", subfolder="x"), False),
    ],
)
def test_a_hub_repository_is_looked_at_again_when_the_manifest_asks_for_another_one(world, source, same):
    expert = world.service.active("reverse").model_copy(update={"source": "hub:org/a@abcdef"})
    assert has_source(expert, Proposal(name="reverse", source=source)) is same
