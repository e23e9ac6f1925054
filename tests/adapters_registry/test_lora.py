"""Ranks and scalings by PEFT's rules."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from pydantic import ValidationError

from adapters_registry.lora import Layout, LoraConfig

MODULES = [f"model.layers.{layer}.self_attn.{name}_proj" for layer in (1, 11) for name in "qv"]
patterns = st.dictionaries(
    st.sampled_from(
        ["q_proj", "proj", "layers.1.self_attn.q_proj", r".*\.1\..*", "self_attn.v_proj", "^model", *MODULES]
    ),
    st.integers(1, 64),
    max_size=4,
)


@given(patterns, st.sampled_from(MODULES))
def test_ranks_are_those_that_peft_gives(ranks: dict[str, int], module: str) -> None:
    config = LoraConfig(r=5, lora_alpha=10, rank_pattern=ranks)
    key = get_pattern_key(ranks.keys(), module)
    assert config.rank(module) == ranks.get(key, 5)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 16 / 4),
        ({"use_rslora": True}, 16 / 2),
        ({"alpha_pattern": {"q_proj": 8}}, 8 / 4),
        ({"rank_pattern": {"q_proj": 64}}, 16 / 64),
        ({"rank_pattern": {"q_proj": 64}, "alpha_pattern": {"q_proj": 8}, "use_rslora": True}, 8 / 8),
    ],
)
def test_the_scaling_is_alpha_over_rank_or_its_root(fields: dict[str, Any], expected: float) -> None:
    assert LoraConfig(r=4, lora_alpha=16, **fields).scaling("model.layers.0.self_attn.q_proj") == expected


@pytest.mark.parametrize("pattern", ["(a+)+", "(a|a)*b", "a*a*a*", "(", "x" * 300, r"(a)\1"])
def test_patterns_that_could_take_for_ever_are_refused(pattern: str) -> None:
    with pytest.raises(ValidationError):
        LoraConfig(r=4, lora_alpha=16, rank_pattern={pattern: 4})


def test_missing_patterns_may_be_null() -> None:
    assert LoraConfig.model_validate({"r": 4, "lora_alpha": 8, "rank_pattern": None}).rank("x") == 4


def test_tensors_are_sorted_by_what_they_are() -> None:
    layout = Layout()
    for name in (
        "base_model.model.a.b.lora_A.weight",
        "a.b.lora_B.weight",
        "x.lora_embedding_A",
        "a.weight",
        "lm_head.base_layer.weight",
    ):
        layout.add(name, (1, 2))
    assert layout.A == {"a.b": ("base_model.model.a.b.lora_A.weight", (1, 2))}
    assert layout.B == {"a.b": ("a.b.lora_B.weight", (1, 2))}
    assert layout.embeddings == ["x.lora_embedding_A"]
    assert layout.unexpected == ["a.weight"]
    assert list(layout.copies) == ["lm_head"]
