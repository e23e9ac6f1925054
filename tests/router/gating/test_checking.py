"""A composite's folder is read with suspicion."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from router.composite import CompositeError, Part, check_composite, compose
from router.gating import GATES
from router.gating.layout import KEY, MARK, TABLES, Layout

Q, K, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def parts(workshop: Any, make_raw: Any) -> list[Part]:
    made: list[Part] = workshop.parts([make_raw(0, 4), make_raw(1, [3, 2], (Q, V), rslora=True), make_raw(2, 2)])
    return made


@pytest.fixture
def composite(parts: list[Part], tmp_path: Path) -> Path:
    compose(tmp_path / "composite", parts, "lag", {"top_k": 1}, max_rank=64)
    return tmp_path / "composite"


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def retensor(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


A_Q, B_Q = (f"base_model.model.{Q}.lora_{side}.weight" for side in "AB")
CONFIGS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda c: c.pop(KEY), "has no 'moerge_gate', so this is no composite"),
    (lambda c: c.update(r=16), "says r = 16, the layout needs 9"),
    (lambda c: c.update(lora_alpha=18), "says lora_alpha = 18"),
    (lambda c: c.update(init_lora_weights=True), "init_lora_weights = True, the layout needs 'moerge-gated'"),
    (lambda c: c.update(rank_pattern={"q_proj": 2}), "sets rank_pattern, which a composite never has"),
    (lambda c: c[KEY].update(format=2), "format 2; this release reads 1"),
    (lambda c: c[KEY].update(gate="nope"), "there is no gate 'nope'"),
    (lambda c: c[KEY].update(settings={"nope": 1}), "nope: Extra inputs"),
    (lambda c: c[KEY].update(gate="constant", settings={"weights": [1]}), "1 weights for 3 members"),
    (lambda c: c[KEY].update(form="unit"), "the layout is in unit form, gate 'lag' with its settings needs scaled"),
    (lambda c: c[KEY].update(extra=3), "3 extra rows, gate 'lag' needs none"),
    (lambda c: c[KEY]["members"].pop(), "r = 9, the layout needs 7"),
    (lambda c: c[KEY]["members"][0].update(rows=-1), "members.0.rows"),
    (lambda c: c.update({KEY: 3}), "format None"),
]
TENSORS: list[tuple[str, Callable[[dict[str, Any]], Any], str]] = [
    (WEIGHTS, lambda t: t.pop(A_Q), f"has only one factor of {Q}"),
    (WEIGHTS, lambda t: t.update({A_Q: t[A_Q][:5].clone()}), f"{Q} has factors of (24, 9) and (5, 24)"),
    (WEIGHTS, lambda t: t.update(odd=torch.zeros(1)), "holds odd, which is no factor"),
    (WEIGHTS, lambda t: t.clear(), "holds no factors"),
    (TABLES, lambda t: t.pop(f"{Q}.scale"), f"lacks scale of {Q}, which gate 'lag' needs"),
    (TABLES, lambda t: t.update({f"{Q}.scale": torch.ones(3)}), f"{Q}.scale of shape (3,), the layout needs (9,)"),
    (TABLES, lambda t: t.update({"model.nowhere.scale": torch.ones(9)}), "holds model.nowhere.scale"),
    (TABLES, lambda t: t.update({f"{Q}.odd": torch.ones(9)}), f"holds {Q}.odd"),
]


@pytest.mark.parametrize(("change", "complaint"), CONFIGS, ids=[complaint for _, complaint in CONFIGS])
def test_a_configuration_that_contradicts_itself_is_found(change: Any, complaint: str, composite: Path) -> None:
    rewrite(composite, change)
    with pytest.raises(CompositeError) as caught:
        check_composite(composite)
    assert complaint in str(caught.value)
    assert str(caught.value).startswith("composite: ")


@pytest.mark.parametrize(("file", "change", "complaint"), TENSORS, ids=[complaint for *_, complaint in TENSORS])
def test_tensors_that_contradict_the_layout_are_found(file: str, change: Any, complaint: str, composite: Path) -> None:
    retensor(composite / file, change)
    with pytest.raises(CompositeError) as caught:
        check_composite(composite)
    assert complaint in str(caught.value)


@pytest.mark.parametrize("file", [WEIGHTS, TABLES, CONFIG])
def test_a_damaged_or_missing_file_is_found(file: str, composite: Path) -> None:
    data = (composite / file).read_bytes()
    (composite / file).write_bytes(data[: len(data) // 2])
    with pytest.raises(CompositeError, match="cannot be read"):
        check_composite(composite)
    (composite / file).unlink()
    with pytest.raises(CompositeError, match="cannot be read"):
        check_composite(composite)


def test_extra_rows_that_reach_the_output_are_found(parts: list[Part], tmp_path: Path) -> None:
    compose(tmp_path / "out", parts, "phatgoose", {}, max_rank=64)
    assert check_composite(tmp_path / "out").extra == 3
    retensor(tmp_path / "out" / WEIGHTS, lambda tensors: tensors[B_Q][:, -1].fill_(1.0))
    with pytest.raises(CompositeError, match="columns of B for rows that only feed the gate are not zero"):
        check_composite(tmp_path / "out")


def test_every_gate_writes_a_folder_that_passes_the_check(workshop: Any, make_raw: Any, make_twin: Any) -> None:
    experts = [make_raw(0, 2), make_raw(1, 3, (Q, V))]
    twin = make_twin(experts, (Q, K, V), torch.randn(4, 24).double())
    for gate in GATES:
        plain = {"normalise": "zscore"} if gate in ("evidence", "probe") else {}
        stored = workshop.statistics(twin, "spectr", plain)
        assert isinstance(workshop.engine(experts, gate, {}, stored).layout, Layout)


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_peft_does_not_load_a_composite(parts: list[Part], tmp_path: Path) -> None:
    compose(tmp_path / "out", parts, "arrow", {}, max_rank=64)
    model = LlamaForCausalLM(
        LlamaConfig(hidden_size=24, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    )
    with pytest.raises(ValueError, match=MARK):
        PeftModel.from_pretrained(model, str(tmp_path / "out"))
