"""Adapters with random weights: an expert's shapes, scale and loudness, and nothing of what it learned."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from adapters_registry.base import BaseSpec
from adapters_registry.lora import CONFIG, WEIGHTS
from adapters_registry.validate import inspect
from eval.random_weights import random_weights
from router.adapter import Adapter
from tests.conftest import LLAMA

#: Ranks, scalings and modules of different people.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rank 1, all modules": {"r": 1, "target_modules": "all-linear"},
    "patterns": {"r": 8, "use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
    "rank over d_out": {"r": 40},
}


@pytest.fixture(scope="module", params=KINDS)
def expert(request: pytest.FixtureRequest, make_adapter: Callable[..., Path], tmp_path_factory: Any) -> Path:
    return make_adapter(tmp_path_factory.mktemp("expert"), seed=3, **KINDS[request.param])


def test_every_module_changes_as_much_and_in_another_direction(expert: Path, tmp_path: Path) -> None:
    ours, theirs = Adapter(random_weights(expert, tmp_path / "random", 0)), Adapter(expert)
    assert ours.modules == theirs.modules
    for module in theirs.modules:
        mine, trained = ours.dense(module), theirs.dense(module)  # the slow way: dW itself
        assert mine is not None
        assert trained is not None
        assert ours.rank(module) == theirs.rank(module)
        torch.testing.assert_close(mine.norm(), trained.norm(), rtol=1e-5, atol=0)
        assert abs(float((mine * trained).sum())) < 0.5 * float(trained.norm() ** 2)


def test_a_is_drawn_as_peft_draws_it_and_b_is_normal(make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    expert = make_adapter(tmp_path / "expert", r=32, target_modules="all-linear")
    tensors = load_file(random_weights(expert, tmp_path / "random", 1) / WEIGHTS)
    for name, tensor in tensors.items():
        if ".lora_A." in name:
            bound = tensor.shape[1] ** -0.5
            assert float(tensor.abs().max()) <= bound
            assert float(tensor.std()) == pytest.approx(bound / 3**0.5, rel=0.1)
        else:
            kurtosis = float((tensor / tensor.std()).pow(4).mean())
            assert kurtosis == pytest.approx(3, abs=0.8), "1.8 if it were uniform"


def test_the_same_seed_gives_the_same_bytes(expert: Path, tmp_path: Path) -> None:
    first, second, other = (
        (random_weights(expert, tmp_path / name, seed) / WEIGHTS).read_bytes()
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first == second != other


def test_what_was_there_is_replaced_and_nothing_else_is_left(expert: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "random"
    random_weights(expert, out, 0)
    (out / "junk").touch()
    random_weights(expert, out, 1)
    assert sorted(each.name for each in out.iterdir()) == [CONFIG, WEIGHTS]
    assert list(out.parent.iterdir()) == [out]
    assert json.loads((out / CONFIG).read_bytes()) == json.loads((expert / CONFIG).read_bytes())


def test_the_registry_and_peft_take_it(expert: Path, base: BaseSpec, tmp_path: Path) -> None:
    out = random_weights(expert, tmp_path / "random", 0)
    assert inspect(out, base).rank == inspect(expert, base).rank
    torch.manual_seed(0)
    model = LlamaForCausalLM(LLAMA).eval()
    ids = torch.tensor([[3, 5, 7]])
    with torch.inference_mode():
        before = model(ids).logits
        after = PeftModel.from_pretrained(model, str(out))(ids).logits
    assert float((before - after).abs().max()) > 1e-4


def test_precision_stays_and_a_module_that_changes_nothing_does_not(
    make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    expert = make_adapter(tmp_path / "expert")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(expert / WEIGHTS).items()}
    silent = next(name for name in sorted(tensors) if ".lora_B." in name)
    tensors[silent] = torch.zeros_like(tensors[silent])
    save_file(tensors, expert / WEIGHTS)
    drawn = load_file(random_weights(expert, tmp_path / "random", 0) / WEIGHTS)
    assert {tensor.dtype for tensor in drawn.values()} == {torch.bfloat16}
    assert not drawn[silent].any()
    assert sum(bool(tensor.any()) for tensor in drawn.values()) == len(drawn) - 1
