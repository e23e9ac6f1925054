"""What a token costs, against counts of the tensors themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from adapters_registry.lora import WEIGHTS
from eval.arena import DATA
from eval.flops import Flops, base_parameters, lora_parameters
from eval.recipe import Recipe, uniform
from router.blending import blend
from router.composite import Part, compose
from tests.conftest import LLAMA

EXPERTS = {name: DATA / "experts" / name for name in ("roman", "uppercase", "vowels")}


def numbers(folder: Path) -> int:
    """Of all tensors of an adapter."""
    return sum(tensor.numel() for tensor in load_file(folder / WEIGHTS).values())


@pytest.fixture(scope="module")
def flops() -> Flops:
    return Flops(DATA / "base", EXPERTS, max_rank=256)


def test_the_base_model_s_parameters_are_counted_without_its_weights(flops: Flops, base_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(DATA / "base")
    assert flops.base == model.num_parameters(), "tied embeddings count once"
    assert flops.of(Recipe()) == 2 * model.num_parameters()
    assert base_parameters(str(base_folder)) == LlamaForCausalLM(LLAMA).num_parameters(), "by its configuration"


@pytest.mark.parametrize("name", EXPERTS)
def test_an_expert_adds_its_own(flops: Flops, name: str) -> None:
    assert lora_parameters(EXPERTS[name]) == numbers(EXPERTS[name])
    assert flops.base is not None
    assert flops.of(Recipe.expert(name)) == 2 * (flops.base + numbers(EXPERTS[name]))


@pytest.mark.parametrize("operator", ["cat", "linear", "svd", "ties", "knots", "fisher", "regmean"])
def test_a_blend_adds_what_its_folder_has(tmp_path: Path, operator: str) -> None:
    for max_rank in (256, 9):
        settings: dict[str, object] = {"rank": 5} if max_rank == 9 and operator == "ties" else {}
        recipe = uniform(list(EXPERTS), operator, settings)
        found = Flops(DATA / "base", EXPERTS, max_rank=max_rank).adapters(recipe)
        if operator in ("fisher", "regmean"):  # as large as one without statistics
            operator = "ties" if operator == "fisher" else "cat"
        parts = [Part(name, name, folder) for name, folder in EXPERTS.items()]
        blend(tmp_path / str(max_rank), parts, [1 / 3] * 3, operator, settings, max_rank=max_rank)
        assert found == numbers(tmp_path / str(max_rank))


def test_a_gate_adds_all_of_its_members(flops: Flops) -> None:
    members = tuple((name, 1.0) for name in EXPERTS)
    recipe = Recipe(kind="gate", gate="arrow", experts=members)
    assert flops.adapters(recipe) == sum(map(numbers, EXPERTS.values()))
    cut = flops.adapters(recipe.model_copy(update={"compress": 1}))
    assert cut == sum(
        tensor.numel() // min(tensor.shape)
        for folder in EXPERTS.values()
        for tensor in load_file(folder / WEIGHTS).values()
    )
    general = Recipe(kind="gate", gate="arrow", experts=members[:2], general="vowels")
    assert (flops.adapters(general) or 0) > sum(numbers(EXPERTS[name]) for name, _ in members[:2])


def test_a_gate_counts_its_own_rows(flops: Flops, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    folders = {name: make_adapter(tmp_path / name, seed=k) for k, name in enumerate("ab")}
    vectors = {f"model.layers.{k}.self_attn.{m}": torch.randn(32) for k in range(2) for m in ("q_proj", "v_proj")}
    parts = [Part(name, name, folder, {"phatgoose": vectors}) for name, folder in folders.items()]
    (tmp_path / "composite").mkdir()
    compose(tmp_path / "composite", parts, "phatgoose", {}, max_rank=64)
    recipe = Recipe(kind="gate", gate="phatgoose", experts=(("a", 1.0), ("b", 1.0)))
    assert Flops(DATA / "base", folders).adapters(recipe) == numbers(tmp_path / "composite")


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(kind="model", model="auto"),
        Recipe.expert("poetry"),
        uniform(["roman", "poetry"]),
        Recipe(kind="gate", gate="arrow", experts=(("roman", 1.0), ("poetry", 1.0))),
        Recipe(kind="gate", gate="probe", experts=(("roman", 0.5), ("vowels", 0.5))),
    ],
)
def test_what_is_not_known_is_none(flops: Flops, recipe: Recipe) -> None:
    assert flops.adapters(recipe) is None
    assert flops.of(recipe) is None


def test_a_base_model_without_a_configuration_is_not_known(tmp_path: Path) -> None:
    assert Flops(tmp_path, EXPERTS).of(Recipe()) is None
