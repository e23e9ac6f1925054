"""The testbed's data sets, each a pure function of a seed: samples, tests, training batches, compositions."""

from __future__ import annotations

from random import Random

from eval.testbed.tasks import Split, Task
from eval.testbed.wordings import WORDINGS

SAMPLES, TESTS = 20, 60
Record = dict[str, str]


def samples(task: Task, seed: int) -> list[Record]:
    """The registration samples of an expert: every registered wording, before any comes twice."""
    return _records(task, Random(f"samples {task.name} {seed}"), WORDINGS[task.name].registered, SAMPLES, "sample")


def tests(task: Task, seed: int) -> list[Record]:
    """The test prompts of an expert, in wordings that neither its samples nor its training ever use."""
    return _records(task, Random(f"tests {task.name} {seed}"), WORDINGS[task.name].unseen, TESTS, "test")


def _records(task: Task, rng: Random, wordings: tuple[str, ...], count: int, split: Split) -> list[Record]:
    records: dict[str, Record] = {}
    while len(records) < count:
        x, answer = task.draw(rng, split)
        prompt = wordings[len(records) % len(wordings)].format(x=x)
        records.setdefault(prompt, {"prompt": prompt, "answer": answer})
    return list(records.values())
