"""Writes the testbed's data files: samples, tests, compositions, out-of-domain prompts and the manifest."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import yaml

from eval.testbed import dataset
from eval.testbed.compositions import COMPOSITIONS
from eval.testbed.experts import BASE_NAME, training_data
from eval.testbed.ood import OOD
from eval.testbed.tasks import TASKS, Task
from eval.testbed.tokens import CONTEXT

LICENCE = "Apache-2.0"
SERVED_NAME = "quickstart"  # what requests call the base model


def write_data(out: Path, seed: int, tasks: Iterable[Task] = TASKS) -> None:
    tasks = tuple(tasks)
    for task in tasks:
        write_jsonl(out / "samples" / f"{task.name}.jsonl", dataset.samples(task, seed))
        write_jsonl(out / "test" / f"{task.name}.jsonl", dataset.tests(task, seed))
    write_jsonl(out / "compositions.jsonl", [r for c in COMPOSITIONS for r in c.records(seed)])
    write_jsonl(out / "ood.jsonl", [{"prompt": prompt} for prompt in OOD])
    text = yaml.safe_dump(manifest(tasks, seed), sort_keys=False, allow_unicode=True, width=110)
    (out / "manifest.yaml").write_text(text)


def manifest(tasks: Iterable[Task], seed: int) -> dict[str, object]:
    return {
        "base_model": {
            "name": SERVED_NAME,
            "path": "base",
            "context": CONTEXT,
            "dtype": "float32",
            "aliases": [BASE_NAME],
        },
        "defaults": {"licence": LICENCE},
        "experts": [
            {
                "name": task.name,
                "source": f"experts/{task.name}",
                "description": task.description,
                "tags": [task.kind, f"{task.told}-told"],
                "training_data": training_data(task, seed),
                "samples": f"samples/{task.name}.jsonl",
            }
            for task in tasks
        ],
    }


def write_jsonl(path: Path, records: Iterable[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_jsonl(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
