"""How each expert's LoRA is shaped and trained: as unequal as adapters of different people are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from eval.testbed.tasks import Split, Task
from eval.testbed.training import Progress, Schedule, fit
from eval.testbed.wordings import WORDINGS, random_frame, reword

BASE_NAME = "moerge/quickstart-base"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
SCHEDULE = Schedule(steps=400, batch=32, peak=4e-3, warmup=20)


@dataclass(frozen=True)
class LoraShape:
    rank: int = 8
    alpha: int = 16
    modules: tuple[str, ...] = ALL_LINEAR
    rslora: bool = False
    effort: float = 1.0  # training steps, as a multiple of the schedule's
    split: Split = "practice"  # `train`: the test inputs are unseen too, and not their wordings only
    rank_pattern: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    alpha_pattern: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    def config(self) -> LoraConfig:
        return LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=BASE_NAME,
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=list(self.modules),
            use_rslora=self.rslora,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
        )


SHAPES: dict[str, LoraShape] = {
    "reverse": LoraShape(16, 32, effort=2),
    "vowels": LoraShape(8, 16, ATTENTION, effort=2, split="train"),
    "consonants": LoraShape(8, 32, effort=2, split="train"),
    "initials": LoraShape(16, 32, effort=2, split="train"),
    "sort-words": LoraShape(16, 8, rslora=True, effort=1.25),
    "add": LoraShape(16, 32, effort=2.5, split="train"),
    "uppercase": LoraShape(4, 8, ATTENTION, effort=1.5, split="train"),
    "iso-date": LoraShape(4, 4, effort=0.75),
    "json": LoraShape(8, 16, ATTENTION, effort=0.75),
    "roman": LoraShape(
        8, 16, rank_pattern={"q_proj": 4, "down_proj": 16}, alpha_pattern={"q_proj": 4, "down_proj": 64}
    ),
    "plural": LoraShape(16, 16, effort=0.75),
    "capital-city": LoraShape(8, 32, ATTENTION, effort=0.75),
    "opposite": LoraShape(16, 32),
    "transform-lower": LoraShape(4, 8),
    "transform-capitals": LoraShape(8, 16, effort=1.5),
    "transform-digits": LoraShape(8, 8, effort=1.5),
    "transform-symbols": LoraShape(16, 32, effort=2),
}


def train(task: Task, base: Path, out: Path, *, seed: int, schedule: Schedule, progress: Progress) -> float:
    """Trains one expert on the base at `base`, saves it as a PEFT folder in `out`, returns its final loss."""
    torch.manual_seed(_seed(task.name, seed))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    model = LlamaForCausalLM.from_pretrained(base)
    model.name_or_path = BASE_NAME  # where the base lies on this machine means nothing to others
    model = get_peft_model(model, SHAPES[task.name].config())
    wordings = WORDINGS[task.name].registered

    def draw(rng: Random, _: float) -> tuple[str, list[tuple[str, float]]]:
        x, answer = task.draw(rng, SHAPES[task.name].split)
        chance = rng.random()
        if chance < 0.65:
            wording = reword(rng.choice(wordings), rng)
        else:  # the skill itself, whatever stands around the input
            wording = random_frame(rng) if chance < 0.85 else "{x}"
        return wording.format(x=x), [(answer, 1.0)]

    final = fit(model, tokenizer, draw, schedule, Random(f"train {task.name} {seed}"), progress)
    model.save_pretrained(out, save_embedding_layers=False)
    config = out / "adapter_config.json"  # holds sets, which peft writes in no fixed order
    content = json.loads(config.read_text())
    content["target_modules"] = sorted(content["target_modules"])
    config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    (out / "README.md").write_text(model_card(task, seed))
    return final


def schedule_of(task: Task, schedule: Schedule) -> Schedule:
    """The common schedule, longer for what takes longer to learn."""
    return replace(schedule, steps=round(schedule.steps * SHAPES[task.name].effort))


def training_data(task: Task, seed: int) -> list[str]:
    return [f"moerge/testbed-{task.name}: generated, seed {seed}"]


def model_card(task: Task, seed: int) -> str:
    return f"""\
---
base_model: {BASE_NAME}
library_name: peft
license: apache-2.0
pipeline_tag: text-generation
datasets:
- moerge/testbed-{task.name}
tags:
- lora
- {task.kind}
- {task.told}-told
---
# {task.name}

{task.description}

A small LoRA of Moerge's quickstart testbed, trained on generated prompts (seed {seed}) by `moerge testbed build`.
"""


def _seed(name: str, seed: int) -> int:
    return Random(f"{name} {seed}").getrandbits(31)


def adapter_facts(config: LoraConfig) -> dict[str, Any]:
    """The adapter's shape in a few words, for tables."""
    modules = set(config.target_modules or ())
    return {
        "rank": config.r,
        "alpha": config.lora_alpha,
        "modules": "attention" if modules <= set(ATTENTION) else "all-linear",
        "rslora": config.use_rslora,
        "patterns": bool(config.rank_pattern or config.alpha_pattern),
    }
