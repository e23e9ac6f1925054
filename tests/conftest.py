"""Shared by the tests of several packages: a tiny random base model, and real PEFT adapters for it."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from adapters_registry.base import BaseSpec

LLAMA = LlamaConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    architectures=["LlamaForCausalLM"],
)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums come out the same on every machine, and tests do not fight for its cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only a config.json: the registry needs no weights of the base model."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    LLAMA.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(base_folder: Path) -> BaseSpec:
    return BaseSpec.from_pretrained(base_folder, name="tiny", aliases={"org/tiny-llama"})


MakeAdapter = Callable[..., Path]


@pytest.fixture(scope="session")
def make_adapter() -> MakeAdapter:
    """`make_adapter(folder, seed=0, llama=LLAMA, **LoraConfig's arguments)`: an adapter as PEFT saves it."""

    def make(folder: Path, seed: int = 0, llama: LlamaConfig = LLAMA, **options: Any) -> Path:
        torch.manual_seed(seed)
        chosen = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options}
        model = LlamaForCausalLM(llama)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
            get_peft_model(model, LoraConfig(**chosen)).save_pretrained(str(folder))
        return folder

    return make


@pytest.fixture(scope="session")
def adapters(make_adapter: MakeAdapter, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Four good adapters with different content; tests must not write to them."""
    root = tmp_path_factory.mktemp("adapters")
    return [make_adapter(root / f"adapter{seed}", seed=seed) for seed in range(4)]


@pytest.fixture
def adapter(adapters: list[Path], tmp_path: Path) -> Path:
    """A copy of a good adapter, to be spoiled."""
    return shutil.copytree(adapters[0], tmp_path / "adapter")
