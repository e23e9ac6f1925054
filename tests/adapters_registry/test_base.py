"""Which modules a base model has, for any architecture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import GPT2Config, LlavaConfig, Qwen2Config

from adapters_registry.base import BaseSpec
from adapters_registry.errors import BaseModelError


def test_a_llama_has_seven_linear_modules_in_each_layer_and_a_head(base: BaseSpec) -> None:
    assert len(base.modules) == 2 * 7 + 1
    assert base.modules["model.layers.1.self_attn.k_proj"] == (16, 32)
    assert base.modules["model.layers.0.mlp.down_proj"] == (32, 48)
    assert base.modules["lm_head"] == (64, 32)


def test_gpt2_stores_its_layers_transposed(tmp_path: Path) -> None:
    GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64).save_pretrained(tmp_path)
    assert BaseSpec.from_pretrained(tmp_path).modules["transformer.h.0.attn.c_attn"] == (96, 32)


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def test_an_architecture_without_a_declared_class_is_a_causal_model(tmp_path: Path) -> None:
    Qwen2Config(**SMALL, num_key_value_heads=2, vocab_size=64).save_pretrained(tmp_path)
    assert "model.layers.0.self_attn.q_proj" in BaseSpec.from_pretrained(tmp_path).modules


def test_a_multimodal_model_is_seen_whole(tmp_path: Path) -> None:
    config = LlavaConfig(
        text_config={"model_type": "llama", "vocab_size": 64, **SMALL},
        vision_config={"model_type": "clip_vision_model", **SMALL},
        architectures=["LlavaForConditionalGeneration"],
    )
    config.save_pretrained(tmp_path)
    modules = BaseSpec.from_pretrained(tmp_path).modules
    assert any("vision" in name for name in modules)
    assert any("language_model" in name for name in modules)


def test_names_are_the_folders_unless_given(base_folder: Path) -> None:
    spec = BaseSpec.from_pretrained(base_folder)
    assert spec.name == "tiny-llama"
    assert str(base_folder) in spec.accepted


def test_a_changed_configuration_is_read_again(tmp_path: Path, base_folder: Path) -> None:
    config = json.loads((base_folder / "config.json").read_text())
    for layers in (1, 3):
        (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
        assert len(BaseSpec.from_pretrained(tmp_path).modules) == 7 * layers + 1


def test_a_folder_without_configuration_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=r"No config\.json in"):
        BaseSpec.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["{", "{}", '{"model_type": "nonsense"}', "[]"])
def test_an_unreadable_configuration_is_said_to_be_one(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BaseModelError, match="Cannot read the configuration of base model"):
        BaseSpec.from_pretrained(tmp_path)
