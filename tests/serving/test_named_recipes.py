"""A decision that is asked for by name is what the server does when it decides by itself."""

from __future__ import annotations

import pytest

from eval.recipe import Recipe
from router.methods import METHODS

REVERSE, FAR = "spell cherry backwards", "zebra quartz"
MIX = {"top_k": 3, "threshold": -1}
#: Servers, and the methods of each; gates whose experts need trained vectors are left out.
SERVERS = {
    "as they are": {name: {} for name in METHODS if name not in ("phatgoose", "meteora")},
    "told otherwise": {
        "retrieval": {**MIX, "weights": "uniform"},
        "arrow": {"compress": 2, "gate": {"top_k": 1}},
        "spectr": {"general": "shout"},
        "evidence": {"prior": False},
        "probe": {"prior": False},
    },
    "merged": {"retrieval": {**MIX, "operator": "ties", "options": {"density": 0.5}}},
    "one member": {"retrieval": {**MIX, "spread": 0.0001, "operator": "ties"}},
}


def told(world, response):
    """Who answers, and all that the engine was asked."""
    body = dict(world.engine.asked[-1].body)
    arguments = {key: value for key, value in (body.pop("vllm_xargs", None) or {}).items() if key != "moerge_trace"}
    experts = sorted(response.headers["x-moerge-experts"].split(","))  # a mixture's best first, a caller's by name
    return response.status_code, experts, response.json()["model"], body, arguments


@pytest.mark.parametrize("name", SERVERS)
async def test_asked_by_name_it_is_the_same(serve, name):
    async with serve(router={"methods": SERVERS[name]}) as world:
        for method in SERVERS[name]:
            for prompt in (REVERSE, FAR):
                routed = told(world, await world.ask(f"auto:{method}", prompt))
                decision = await world.service.router.route(prompt, method=method)
                request = Recipe.of(decision).request("tiny")
                named = told(world, await world.ask(request.pop("model"), prompt, **request))
                assert routed[0] == 200, routed
                assert named == routed, method
