"""The testbed as it is shipped: complete, small, intact, and good."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters_registry.manifest import read_manifest
from eval.testbed import build as building
from eval.testbed import check as checking
from eval.testbed import dataset
from eval.testbed.build import DATA
from eval.testbed.experts import SHAPES
from eval.testbed.generate import answers
from eval.testbed.manifest import read_jsonl
from eval.testbed.tasks import BY_NAME, TASKS
from eval.testbed.wordings import WORDINGS

FACTS = json.loads((DATA / "testbed.json").read_text())
SERVED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_every_file_is_the_one_that_was_built() -> None:
    assert building.checksums(DATA) == FACTS["sha256"]


def test_all_of_it_is_under_fifteen_megabytes() -> None:
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 15_000_000


def test_no_file_names_a_path_of_the_machine_that_built_it() -> None:
    for path in DATA.rglob("*"):
        if path.suffix in {".json", ".jsonl", ".md", ".yaml", ".jinja"}:
            text = path.read_text()
            assert str(Path.home()) + "/" not in text
            assert "/tmp" not in text


def test_the_manifest_is_valid_and_complete() -> None:
    manifest = read_manifest(DATA / "manifest.yaml")
    assert [proposal.name for proposal in manifest.proposals] == [task.name for task in TASKS]
    for proposal in manifest.proposals:
        assert len(proposal.samples) == dataset.SAMPLES
        assert proposal.licence == "Apache-2.0"
        assert proposal.training_data
        assert proposal.description


def test_the_data_are_what_the_seed_gives() -> None:
    for task in TASKS:
        assert read_jsonl(DATA / "samples" / f"{task.name}.jsonl") == dataset.samples(task, building.SEED)
        assert read_jsonl(DATA / "test" / f"{task.name}.jsonl") == dataset.tests(task, building.SEED)
    assert len(read_jsonl(DATA / "compositions.jsonl")) == 96
    assert len(read_jsonl(DATA / "ood.jsonl")) == 100


def test_experts_are_as_unequal_as_declared() -> None:
    for task in TASKS:
        config = LoraConfig.from_pretrained(DATA / "experts" / task.name)
        shape = SHAPES[task.name]
        assert config.base_model_name_or_path == "moerge/quickstart-base"
        assert set(config.target_modules) == set(shape.modules) <= SERVED
        assert (config.r, config.lora_alpha, config.use_rslora) == (shape.rank, shape.alpha, shape.rslora)
        assert config.rank_pattern == dict(shape.rank_pattern)
        assert config.bias == "none"
        assert not config.modules_to_save
        with safe_open(DATA / "experts" / task.name / "adapter_model.safetensors", "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a mapping)
                if "lora_A" in key:
                    module = key.split(".")[-3]
                    assert tensors.get_slice(key).get_shape()[0] == shape.rank_pattern.get(module, shape.rank)
    shapes = SHAPES.values()
    assert {shape.rank for shape in shapes} == {4, 8, 16}
    assert len({shape.modules for shape in shapes}) == 2
    assert sum(shape.rslora for shape in shapes) == 1
    assert sum(bool(shape.rank_pattern and shape.alpha_pattern) for shape in shapes) == 1


def test_what_was_measured_at_the_build_keeps_the_promises() -> None:
    measured = FACTS["measured"]
    table = checking.Table(base=measured["base"], matrix=measured["matrix"])
    assert table.failures() == []
    assert set(table.matrix) == set(BY_NAME)


@pytest.mark.parametrize("name", ["reverse", "roman", "vowels", "transform-symbols"])
def test_an_expert_answers_its_own_prompts_through_peft(name: str) -> None:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(DATA / "base"), DATA / "experts" / name)
    tokenizer = AutoTokenizer.from_pretrained(DATA / "base")
    tests = read_jsonl(DATA / "test" / f"{name}.jsonl")[:20]
    replies = answers(model.eval(), tokenizer, [test["prompt"] for test in tests])
    assert sum(reply == test["answer"] for reply, test in zip(replies, tests, strict=True)) >= 18


def test_the_readmes_request_is_answered_and_its_wording_was_never_trained_on() -> None:
    assert "Spell {x} backwards" in WORDINGS["reverse"].unseen
    _, tokenizer = checking.load_base(DATA)
    assert answers(checking.load_expert(DATA, "reverse"), tokenizer, ["Spell banana backwards"]) == ["ananab"]


def test_the_base_alone_does_not_answer() -> None:
    base, tokenizer = checking.load_base(DATA)
    assert answers(base, tokenizer, ["Spell banana backwards", "Tell me a joke"]) == ["I do not know."] * 2
