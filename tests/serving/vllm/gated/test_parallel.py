"""Two tensor-parallel workers: exact where every rank sees whole scores, refused where it would see parts."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from eval.twin import Composite, Twin
from router.gating.layout import Layout, Member
from serving.engine.batch import TRACE, WEIGHTS
from serving.engine.private import Plugin

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

MIXED = ("roman", "iso-date", "json", "sort-words")


@pytest.fixture(scope="module")
def engine(start: Callable[..., Any]) -> Any:
    return start(max_loras=4, tensor_parallel_size=2, fully_sharded_loras=True)


def test_two_ranks_answer_as_one(engine, base, prompts):
    """Rank rows are split over the ranks, inputs of o and down too; one gate divides by the whole input's length."""
    gates = {"arrow": {}, "spectr": {"normalise": "rms"}, "evidence": {"beta": 0.02}}
    names = [engine.make(gate, MIXED, **settings) for gate, settings in gates.items()]
    twins = {name: Twin(base, Composite.read(engine.paths[name])) for name in names}
    asked = [(name, prompts["roman"][0], {TRACE: name}) for name in names]
    asked += [(names[2], prompts["json"][0], {WEIGHTS: [0.7, 0.1, 0.1, 0.1]})]
    assert all(engine.same(asked, lambda ids, each: twins[each[0]].logprobs(ids, each[2].get(WEIGHTS))))
    assert engine.trace(names[0]).tokens >= len(prompts["roman"][0]) + 23


def plugin(**config: Any) -> Plugin:
    """One that knows nothing but its engine's configuration."""
    parallel = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, **config.pop("parallel", {})}
    sharded = config.pop("fully_sharded_loras", False)
    defaults = {"use_v2_model_runner": False, "speculative_config": None, "kv_transfer_config": None, **config}
    manager = SimpleNamespace(
        modules={}, punica_wrapper_mapping={}, lora_config=SimpleNamespace(fully_sharded_loras=sharded)
    )
    return Plugin(manager, SimpleNamespace(parallel_config=SimpleNamespace(**parallel), **defaults))


@pytest.mark.parametrize(
    ("config", "gate", "why"),
    [
        ({"parallel": {"tensor_parallel_size": 2}}, "arrow", "fully_sharded_loras"),
        ({"use_v2_model_runner": True}, "arrow", "VLLM_USE_V2_MODEL_RUNNER=0"),
        ({"speculative_config": object()}, "evidence", "speculative decoding"),
        ({"kv_transfer_config": object()}, "probe", "KV transfer"),
        ({"parallel": {"pipeline_parallel_size": 2}}, "evidence", "pipeline"),
    ],
)
def test_an_engine_that_cannot_gate_says_why(config, gate, why):
    layout = Layout(gate=gate, members=(Member(id="a", rows=1), Member(id="b", rows=1)))
    (reason,) = plugin(**config).reasons_against_gates(layout)
    assert why in reason
    assert not plugin().reasons_against_gates(layout)


def test_towers_with_adapters_of_their_own_are_not_gated():
    two = plugin()
    two._wrappers = [SimpleNamespace(), SimpleNamespace()]
    two._manager.punica_wrapper_mapping = {"language": two._wrappers[0], "vision": two._wrappers[1]}
    (reason,) = two.reasons_against_gates(
        Layout(gate="arrow", members=(Member(id="a", rows=1), Member(id="b", rows=1)))
    )
    assert "enable_tower_connector_lora" in reason


def test_state_per_block_needs_one_kind_of_block():
    layout = Layout(gate="evidence", members=(Member(id="a", rows=1), Member(id="b", rows=1)))
    hybrid = plugin()
    hybrid.runner = SimpleNamespace(kv_cache_config=SimpleNamespace(kv_cache_groups=[1, 2]))
    (reason,) = hybrid.reasons_against_gates(layout)
    assert "one kind of KV cache" in reason


def test_gates_without_state_do_not_mind_speculation_and_stages():
    layout = Layout(gate="spectr", members=(Member(id="a", rows=1), Member(id="b", rows=1)))
    parallel = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    able = plugin(speculative_config=object(), parallel=parallel, fully_sharded_loras=True)
    assert not able.reasons_against_gates(layout)
