"""Statistics of experts' scores on neutral prompts: what is read, what is kept, when it is measured."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from adapters_registry.expert import State
from router.composite import CompositeError
from serving.calibration import FLOOR, NEUTRAL, PROMPTS, Score, Sums, score_of
from serving.recipes import layout_of

REVERSE = "spell cherry backwards"
KEY = "statistics/scaled/spectr"
MODULES = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")]


async def kept(world, name, key=KEY):
    return await asyncio.to_thread(world.registry.tensors, name, None, key)


async def test_experts_are_measured_when_a_gate_first_needs_it_and_once(world, until):
    assert await kept(world, "count") is None
    first = await asyncio.gather(*(world.ask("auto:evidence", f"{REVERSE} {k}") for k in range(8)))
    assert {each.json()["model"] for each in first} == {"auto:evidence"}
    asked = len([each for each in world.engine.asked if "moerge_collect" in (each.body.get("vllm_xargs") or {})])
    for name in ("count", "reverse", "shout"):
        assert sorted(await kept(world, name)) == sorted(
            f"{module}.{kind}" for module in MODULES for kind in ("mean", "deviation", "centre")
        )
    await world.ask("auto:probe", REVERSE)  # the same score
    again = [each for each in world.engine.asked if each.body.get("vllm_xargs", {}).get("moerge_collect") == "moments"]
    assert len(again) == asked


async def test_the_statistics_are_what_was_seen(world):
    await world.ask("auto:evidence", REVERSE)
    model = next(each.body["model"] for each in world.engine.asked if "vllm_xargs" in each.body)
    layout = await asyncio.to_thread(layout_of, world.engine.paths[model])
    assert (layout.gate, layout.settings["normalise"]) == ("probe", "none")
    for k, name in enumerate(("count", "reverse", "shout")):  # the engine's scores: mean k + 1, variance 0.25
        found = await kept(world, name)
        for module in MODULES:
            assert found[f"{module}.mean"] == pytest.approx(k + 1)
            assert found[f"{module}.deviation"] == pytest.approx(0.5)
            assert found[f"{module}.centre"].shape == (4,)
            np.testing.assert_allclose(found[f"{module}.centre"], 2.0)


async def test_an_expert_is_not_measured_on_its_own_samples(world):
    calibration = world.service.calibration
    prompts = calibration.neutral(world.service.active("reverse"))
    assert not {"spell banana backwards", "spell window backwards"} & set(prompts)
    assert {"write banana loudly", "how many letters has window"} <= set(prompts)
    assert set(NEUTRAL) <= set(prompts)  # the library alone is too small


async def test_a_large_library_is_sampled_always_alike(world, register, adapters):
    samples = [f"say {k} in french" for k in range(300)]
    await asyncio.to_thread(register, world.registry, "translate", adapters[3], State.ACTIVE, samples=samples)
    await world.service.refresh()
    prompts = world.service.calibration.neutral(world.service.active("reverse"))
    assert len(prompts) == PROMPTS
    assert prompts == world.service.calibration.neutral(world.service.active("reverse"))
    assert not set(NEUTRAL) & set(prompts)


async def test_whoever_comes_later_is_measured_in_the_background(watchful, world, register, adapters, until):
    await world.ask("auto:evidence", REVERSE)
    await asyncio.to_thread(register, world.registry, "translate", adapters[3], State.ACTIVE, samples=["say it"])
    await until(lambda: world.service.active("translate"))
    await until(lambda: any(name.startswith("translate@") for name, _ in world.service.calibration._known))
    assert await kept(world, "translate") is not None


async def test_without_gates_that_need_it_nothing_is_measured(world):
    for gate in ("arrow", "constant", "hilora"):
        await world.ask(f"auto:{gate}", REVERSE)
    await world.service.refresh()
    assert all("vllm_xargs" not in each.body or gate == "constant" for each in world.engine.asked[:1])
    assert await kept(world, "count") is None


async def test_centred_scores_take_a_second_pass(world):
    moerge = {"gate": "evidence", "settings": {"score": "smile", "centred": True, "k_gate": 2}}
    response = await world.ask("auto", REVERSE, moerge=moerge)
    assert response.json()["model"] == "auto:evidence"
    assert await kept(world, "shout", "statistics/unit/smile-2-centred") is not None
    assert await kept(world, "shout", "statistics/unit/smile-2") is None
    used = {each.body["model"] for each in world.engine.asked if "moerge_collect" in each.body.get("vllm_xargs", {})}
    layouts = [await asyncio.to_thread(layout_of, world.engine.paths[name]) for name in used]
    assert sorted(each.settings["centred"] for each in layouts) == [False, True]


async def test_a_prompt_that_does_not_suit_a_chat_is_read_as_text(world, monkeypatch):
    answer = type(world.engine)._app

    async def no_template(engine, scope, receive, send):
        engine.answer = (400, {"error": {"message": "no chat template"}}) if "chat" in scope["path"] else None
        await answer(engine, scope, receive, send)

    monkeypatch.setattr(type(world.engine), "_app", no_template)
    response = await world.http.post("/v1/completions", json={"model": "auto:evidence", "prompt": REVERSE})
    assert response.json()["model"] == "auto:evidence"
    assert await kept(world, "count") is not None


async def test_an_engine_that_fails_while_reading_is_a_503_and_the_next_request_tries_again(world):
    await world.ask("auto:arrow", REVERSE)
    world.engine.answer = (500, {"error": {"message": "out of memory"}})
    response = await world.ask("auto:evidence", REVERSE)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_unavailable")
    world.engine.answer = None
    assert (await world.ask("auto:evidence", REVERSE)).json()["model"] == "auto:evidence"


async def test_an_expert_alone_has_nobody_to_be_compared_with(serve, register, adapters):
    async with serve(empty=True) as world:
        await asyncio.to_thread(register, world.registry, "alone", adapters[0], State.ACTIVE, samples=[REVERSE])
        await world.service.refresh()
        assert (await world.ask("auto:evidence", REVERSE)).json()["model"] == "alone"
        assert (await calibrate(world)).json()["measured"] == []


async def test_prepared_experts_are_measured_as_they_are_used(world):
    moerge = {"experts": ["count", "reverse"], "gate": "evidence", "compress": 2, "general": "shout"}
    assert (await world.ask("auto", REVERSE, moerge=moerge)).json()["model"] == "auto:evidence"
    digest = world.service.active("shout").digest[:12]
    found = await kept(world, "count", f"{KEY}-minus-{digest}-rank-2")
    assert found[f"{MODULES[0]}.centre"].shape == (2,)
    assert await kept(world, "count") is None
    assert await kept(world, "shout", f"{KEY}-minus-{digest}-rank-2") is None


# POST /v1/gates/calibrate


async def calibrate(world, **body):
    return await world.http.post("/v1/gates/calibrate", json=body)


async def test_all_experts_can_be_measured_beforehand(world):
    response = await calibrate(world)
    assert response.json() == {"object": "calibration", "key": KEY, "measured": ["count", "reverse", "shout"]}
    assert (await calibrate(world)).json()["measured"] == []
    assert (await calibrate(world, experts=["shout"], again=True)).json()["measured"] == ["shout"]


async def test_the_prompts_can_be_given(world):
    await calibrate(world, experts=["shout"], prompts=["one thing", "another"], gate="probe")
    read = [each.body["messages"][0]["content"] for each in world.engine.asked]
    assert sorted(read) == ["another", "one thing"]
    assert await kept(world, "shout") is not None
    assert await kept(world, "count") is None


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"experts": ["nobody"]}, 404, "nobody"),
        ({"gate": "nonsense"}, 422, "nonsense"),
        ({"gate": "arrow"}, 422, "no statistics"),
        ({"settings": {"score": "nonsense"}}, 422, "score"),
        ({"gate": "phatgoose", "settings": {"normalise": "zscore"}}, 422, "cannot be measured"),
        ({"prompts": []}, 400, "prompts"),
        ({"froce": True}, 400, "froce"),
    ],
)
async def test_what_cannot_be_measured_says_why(world, body, status, says):
    response = await calibrate(world, **body)
    assert response.status_code == status, response.text
    assert says in response.json()["error"]["message"]


async def test_only_the_operator_calibrates(serve):
    async with serve() as world:
        _, token = await asyncio.to_thread(world.registry.keys.create, "ann", ["infer", "admin"])
        response = await world.http.post("/v1/gates/calibrate", json={}, headers={"x-api-key": token})
        assert response.status_code == 403


# The arithmetic


def test_sums_over_prompts_are_the_mean_and_deviation_over_tokens():
    rng = np.random.default_rng(0)
    scores, z = rng.normal(3, 2, (50, 2)), rng.normal(size=(50, 7))
    sums = Sums(rows=slice(4, 7))
    for cut in (slice(0, 13), slice(13, 14), slice(14, 50)):
        s = scores[cut]
        count = np.full(2, len(s))
        sums.add({"m.count": count, "m.score": s.sum(0), "m.square": (s**2).sum(0), "m.z": z[cut].sum(0)}, 1)
    found = sums.statistics()
    np.testing.assert_allclose(found["m.mean"], scores[:, 1].mean(), rtol=1e-5)
    np.testing.assert_allclose(found["m.deviation"], scores[:, 1].std(), rtol=1e-5)
    np.testing.assert_allclose(found["m.centre"], z[:, 4:].mean(0), rtol=1e-4, atol=1e-6)


def test_a_score_that_never_changes_has_a_deviation_all_the_same():
    sums = Sums(rows=slice(0, 1))
    sums.add({"m.count": [9], "m.score": [9], "m.square": [9], "m.z": [0]}, 0)
    assert sums.statistics()["m.deviation"] == pytest.approx(FLOOR)


def test_nothing_read_is_nothing_calibrated():
    with pytest.raises(CompositeError, match="nothing could be calibrated"):
        Sums(rows=slice(0, 1)).statistics()


SPECTR = {"score": "spectr", "normalise": "none", "centred": False}


@pytest.mark.parametrize(
    ("key", "score"),
    [
        (KEY, Score(SPECTR)),
        ("statistics/unit/arrow-centred", Score({"score": "arrow", "normalise": "none", "centred": True})),
        ("statistics/unit/smile-16", Score({**SPECTR, "score": "smile", "k_gate": 16})),
        (f"{KEY}-rank-2", Score(SPECTR, compress=2)),
        (f"{KEY}-minus-0123456789ab-rank-2", Score(SPECTR, general="0123456789ab", compress=2)),
    ],
)
def test_a_key_says_how_to_measure_it(key, score):
    assert score_of(key) == score
