"""Builds the whole testbed from a seed: base, experts, data sets, measurements, checksums."""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from random import Random

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eval.testbed import experts, latent
from eval.testbed.check import measure
from eval.testbed.manifest import write_data
from eval.testbed.tasks import BY_NAME, TASKS, Task
from eval.testbed.tokens import CONTEXT, make_tokenizer
from eval.testbed.training import Schedule, fit
from eval.testbed.workers import Report, Steps, Workers

SEED = 0
DATA = Path(__file__).parent / "data"
PARTIAL = ".partial"


@dataclass(frozen=True)
class Recipe:
    """Everything that the result depends on. The same recipe in the same folder continues where it stopped."""

    seed: int = SEED
    first: Schedule = field(default=Schedule(steps=3600, batch=32, peak=2.5e-3, warmup=100))
    second: Schedule = field(default=Schedule(steps=1200, batch=32, peak=2e-3, warmup=50))
    expert: Schedule = field(default=experts.SCHEDULE)

    def scaled(self, steps: int) -> Recipe:
        """The same with at most so many steps each: quick, and good for nothing but a trial run."""
        return replace(
            self,
            first=replace(self.first, steps=min(steps, self.first.steps)),
            second=replace(self.second, steps=min(steps, self.second.steps)),
            expert=replace(self.expert, steps=min(steps, self.expert.steps)),
        )


class OtherRecipe(Exception):
    """The folder holds a build of another recipe."""

    def __init__(self, out: Path) -> None:
        super().__init__(
            f"{out} holds a testbed of another seed or schedule. Choose another folder, or delete this one."
        )


def build(
    out: Path,
    recipe: Recipe,
    workers: Workers,
    *,
    report: Report,
    measured: Report,
    tasks: Sequence[Task] = TASKS,
    retrain: Sequence[str] = (),
) -> None:
    """Trains what `out` does not hold yet, and the experts of `retrain` again, then measures all of it.

    A folder of another recipe raises OtherRecipe.
    """
    out.mkdir(parents=True, exist_ok=True)
    _claim(out, recipe)
    for name in retrain:
        shutil.rmtree(out / "experts" / name, ignore_errors=True)
    submit, steps = workers.executor.submit, workers.steps
    base = out / "base"
    if not base.exists():
        workers.finish([submit(_train_base, base, recipe, steps)], report)
    missing = [task for task in tasks if not (out / "experts" / task.name).exists()]
    workers.finish([submit(_train_expert, task.name, out, recipe, steps) for task in missing], report)
    write_data(out, recipe.seed, tasks)
    _write_facts(out, recipe, tasks, workers, measured)


def _claim(out: Path, recipe: Recipe) -> None:
    path = out / "recipe.json"
    text = json.dumps(asdict(recipe), indent=1) + "\n"
    if path.exists() and path.read_text() != text:
        raise OtherRecipe(out)
    path.write_text(text)


# ---- jobs: what workers do ----


def _train_base(out: Path, recipe: Recipe, queue: Steps) -> None:
    torch.manual_seed(recipe.seed)
    tokenizer = make_tokenizer()
    model = make_base(tokenizer)
    total = recipe.first.steps + recipe.second.steps
    for schedule, draw, before in (
        (recipe.first, latent.draw_first, 0),
        (recipe.second, latent.draw_second, recipe.first.steps),
    ):

        def progress(step: int, loss: float, before: int = before) -> None:
            if (before + step) % 10 == 0:
                queue.put(("base", before + step, total, loss))

        fit(model, tokenizer, draw, schedule, Random(recipe.seed), progress)
    with _whole(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _train_expert(name: str, out: Path, recipe: Recipe, queue: Steps) -> None:
    task = BY_NAME[name]
    schedule = experts.schedule_of(task, recipe.expert)

    def progress(step: int, loss: float) -> None:
        if step % 10 == 0 or step == schedule.steps:
            queue.put((name, step, schedule.steps, loss))

    with _whole(out / "experts" / name) as folder:
        experts.train(task, out / "base", folder, seed=recipe.seed, schedule=schedule, progress=progress)


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes its name only once all is written."""
    partial = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.rename(folder)


def make_base(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 0.67 million parameters, its weights random."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # Answers are facts, not prose: servers that heed the model's own defaults take the likeliest token.
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


# ---- what was built ----


def _write_facts(out: Path, recipe: Recipe, tasks: Sequence[Task], workers: Workers, report: Report) -> None:
    """testbed.json: recipe, versions, measured figures, and the sha256 of every other file."""
    done = 0

    def advance(name: str) -> None:
        nonlocal done
        done += 1
        report(name, done, len(tasks) + 1, 0.0)

    table = measure(out, workers, advance)
    facts = {
        "recipe": asdict(recipe),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "peft", "tokenizers")},
        },
        "experts": {task.name: _expert_facts(task) for task in tasks},
        "measured": {
            "base_exact_match": table.base_mean,
            "base": table.base,
            "matrix": table.matrix,
        },
        "sha256": checksums(out),
    }
    (out / "testbed.json").write_text(json.dumps(facts, indent=1) + "\n")


def _expert_facts(task: Task) -> dict[str, object]:
    return {
        "kind": task.kind,
        "told": task.told,
        **experts.adapter_facts(experts.SHAPES[task.name].config()),
    }


def checksums(folder: Path) -> dict[str, str]:
    """The sha256 (hex) of each file below `folder`, by relative path, but for testbed.json itself."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "testbed.json"
    }
