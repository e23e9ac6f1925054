"""A base model and experts with random weights, of a size where the model's own work counts. For benchmarks only."""

from __future__ import annotations

import string
from pathlib import Path

import torch
import yaml

LAYERS, WIDTH, INNER, HEADS, EXPERTS, RANK = 8, 1024, 2816, 8, 8, 16
TOPICS = ("cooking", "football", "astronomy", "tax law", "gardening", "opera", "chess", "plumbing")
QUESTIONS = (
    "What should a beginner know about {}?",
    "Explain {} to a child",
    "Who is famous for {}?",
    "Give me three tips on {}",
    "Why do people like {}?",
)


def write_synthetic(folder: Path) -> Path:
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
            hidden_size=WIDTH,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
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
