"""A base model and experts with random weights, of a size where the model's own work counts. For benchmarks only."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters_registry.lora import CONFIG, WEIGHTS
from router.composite import Part, compose, statistics_key
from router.gating import GATES, gate_of
from router.gating.layout import Layout, Member

LAYERS, WIDTH, INNER, HEADS, EXPERTS, RANK = 8, 1024, 2816, 8, 8, 16
TOPICS = ("cooking", "football", "astronomy", "tax law", "gardening", "opera", "chess", "plumbing")
QUESTIONS = (
    "What should a beginner know about {}?",
    "Explain {} to a child",
    "Who is famous for {}?",
    "Give me three tips on {}",
    "Why do people like {}?",
)


def write_synthetic(folder: Path, layers: int = LAYERS, width: int = WIDTH, inner: int = INNER) -> Path:
    """A random Llama (about 100 M parameters), rank-16 adapters on all its linear layers, and their manifest."""
    from peft import LoraConfig, get_peft_model
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    vocabulary = {each: number for number, each in enumerate(("<pad>", "<s>", "</s>", "<unk>", *string.printable))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")  # noqa: S106
    fast.chat_template = "<s>{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    fast.save_pretrained(folder / "base")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=1024,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    model.save_pretrained(folder / "base")
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"))
    adapted.peft_config["default"].base_model_name_or_path = "synthetic"
    experts = []
    for topic in TOPICS[:EXPERTS]:
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, std=0.02)
        name = topic.replace(" ", "-")
        adapted.save_pretrained(folder / name)
        samples = [question.format(topic) for question in QUESTIONS]
        experts.append({"name": name, "source": name, "description": topic, "samples": samples})
    base = {"name": "synthetic", "path": "base", "context": 1024, "dtype": "float32"}
    manifest = folder / "manifest.yaml"
    manifest.write_text(yaml.safe_dump({"base_model": base, "experts": experts}))
    return manifest


def write_stack(folder: Path, experts: Sequence[Path]) -> None:
    """The experts' factors on top of each other as one ordinary adapter: what a composite computes without its gate."""
    loaded = [load_file(expert / WEIGHTS) for expert in experts]
    along = {"lora_A": 0, "lora_B": 1}
    folder.mkdir()
    stacked = {
        key: torch.cat([each[key] for each in loaded], next(dim for name, dim in along.items() if name in key))
        for key in loaded[0]
    }
    save_file(stacked, folder / WEIGHTS)
    config = json.loads((experts[0] / CONFIG).read_text())
    rank = RANK * len(experts)
    (folder / CONFIG).write_text(json.dumps({**config, "r": rank, "lora_alpha": rank}))


def write_composite(folder: Path, experts: Sequence[Path], gate: str, settings: dict[str, Any], max_rank: int) -> None:
    """The experts behind a gate, with random vectors and statistics; compressed where extra rows would not fit."""
    most = (max_rank // len(experts) - GATES[gate].extra) if GATES[gate].extra else None
    key = statistics_key(gate_of(Layout(gate=gate, settings=settings, members=PLACEHOLDERS)), compress=most)
    parts = [
        Part(expert.name, expert.name, expert, {gate: vectors(expert), **({key: statistics(expert)} if key else {})})
        for expert in experts
    ]
    compose(folder, parts, gate, settings, max_rank=max_rank, compress=most)


PLACEHOLDERS = (Member(id="one", rows=RANK), Member(id="other", rows=RANK))


def vectors(expert: Path) -> dict[str, Tensor]:
    """{module: (d_in,)} a random gate vector for every module."""
    return {module: torch.randn(A.shape[1]) for module, A in factors(expert).items()}


def statistics(expert: Path) -> dict[str, Tensor]:
    """{"<module>.mean": (), "<module>.deviation": ()}"""
    return {
        f"{module}.{name}": torch.tensor(value)
        for module in factors(expert)
        for name, value in (("mean", 0.5), ("deviation", 1.0))
    }


def factors(expert: Path) -> dict[str, Tensor]:
    """{module: A}"""
    weights = load_file(expert / WEIGHTS)
    return {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): tensor
        for key, tensor in weights.items()
        if key.endswith(".lora_A.weight")
    }
