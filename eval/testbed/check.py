"""Is the testbed what it claims to be? The base's and every expert's exact match on every task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import as_completed
from pathlib import Path

import yaml
from peft import PeftModel
from pydantic import BaseModel, ConfigDict
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from eval.testbed.generate import answers
from eval.testbed.manifest import read_jsonl
from eval.testbed.workers import Workers

BASE_LIMIT = 0.10
EXPERT_LIMIT = 0.95
BASE = "(base)"  # no expert can have this name

Tests = Mapping[str, list[dict[str, str]]]  # by expert
Scores = dict[str, float]  # exact match (0 to 1) by task


class Table(BaseModel):
    """Exact match on test prompts: `matrix[expert][task]`, and `base[task]` without any expert."""

    model_config = ConfigDict(frozen=True)

    base: Scores
    matrix: dict[str, Scores]

    @property
    def base_mean(self) -> float:
        return sum(self.base.values()) / len(self.base)

    @property
    def own(self) -> Scores:
        return {expert: row[expert] for expert, row in self.matrix.items()}

    def failures(self) -> list[str]:
        """What breaks the testbed's promises, one sentence each; empty when all is well."""
        problems = [
            f"{expert} reaches {score:.3f} exact match on its own test prompts, less than {EXPERT_LIMIT}"
            for expert, score in self.own.items()
            if score < EXPERT_LIMIT
        ]
        if self.base_mean > BASE_LIMIT:
            problems.append(f"the base reaches {self.base_mean:.3f} exact match, more than {BASE_LIMIT}")
        return problems


def expert_names(data: Path) -> list[str]:
    listed = yaml.safe_load((data / "manifest.yaml").read_text())["experts"]
    return [expert["name"] for expert in listed]


def read_tests(data: Path) -> Tests:
    return {name: read_jsonl(data / "test" / f"{name}.jsonl") for name in expert_names(data)}


def load_base(data: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    model = LlamaForCausalLM.from_pretrained(data / "base").eval()
    return model, PreTrainedTokenizerFast.from_pretrained(data / "base")


def load_expert(data: Path, name: str) -> PreTrainedModel:
    """The base with the expert's update added to its weights."""
    base, _ = load_base(data)
    merged = PeftModel.from_pretrained(base, data / "experts" / name).merge_and_unload()
    return merged.eval()


def exact_match(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tests: Tests) -> Scores:
    """The share of each task's prompts that the model answers to the letter."""
    rows = [(task, test) for task, records in tests.items() for test in records]
    replies = answers(model, tokenizer, [test["prompt"] for _, test in rows])
    right = dict.fromkeys(tests, 0)
    for (task, test), reply in zip(rows, replies, strict=True):
        right[task] += reply == test["answer"]
    return {task: right[task] / len(records) for task, records in tests.items()}


def measure(data: Path, workers: Workers, advance: Callable[[str], None] = lambda _: None) -> Table:
    """Every expert on every task. `advance` is called with the name of each model once it is measured."""
    names = expert_names(data)
    jobs = {workers.executor.submit(_measure_one, data, name): name or BASE for name in (None, *names)}
    for job in as_completed(jobs):
        job.result()
        advance(jobs[job])
    scores = {name: job.result() for job, name in jobs.items()}
    return Table(base=scores.pop(BASE), matrix={name: scores[name] for name in names})


def _measure_one(data: Path, name: str | None) -> Scores:
    base, tokenizer = load_base(data)
    return exact_match(base if name is None else load_expert(data, name), tokenizer, read_tests(data))
