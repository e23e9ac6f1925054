"""Blends of the testbed's experts in this process: built as a server builds them, then loaded into the model by hooks.

blended = Blended(arena)
with blended.loaded(Recipe(("roman", "vowels"), (0.5, 0.5)), "ties", {"density": 0.3}):
    ...                                    # arena.model answers as the blend
blended.found("lorahub", ("roman",), members)   # weights from a search on labelled prompts
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adapters_registry.expert import Sample
from eval.arena import LIMIT, Arena, Set
from eval.testbed.compositions import COMPOSITIONS
from eval.testbed.generate import answers
from eval.testbed.manifest import read_jsonl
from router.adapted import Adapted, Batch, encode
from router.blending import blend, lorahub, soup
from router.blending.measuring import measure
from router.blending.operator import Statistic
from router.composite import Part

MAX_RANK = 256  # over the ranks of all experts together, so that nothing is cut but what an operator itself cuts
LABELLED = 20  # prompts that a search sees: as many as an expert has samples


class Recipe(NamedTuple):
    """Members of a blend and their weights, in the same order."""

    members: Set
    weights: tuple[float, ...]


class Blended:
    """`statistics` are those of `fisher` and `regmean`, kind -> expert -> module -> tensor, once they are measured."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.statistics: dict[str, dict[str, Mapping[str, Tensor]]] = {}
        self._found: dict[tuple[str, Set, Set], tuple[float, ...]] = {}

    @contextmanager
    def loaded(
        self, recipe: Recipe, operator: str = "cat", settings: Mapping[str, Any] | None = None
    ) -> Iterator[None]:
        """The model has this blend on it; the base model alone where all weights are zero."""
        if not any(recipe.weights):
            yield
            return
        scratch = Path(tempfile.mkdtemp(prefix="moerge-blend-"))
        try:
            parts = [self.part(name) for name in recipe.members]
            blend(scratch / "blend", parts, recipe.weights, operator, settings, max_rank=MAX_RANK)
            adapted = Adapted(self.arena.model, scratch / "blend")
        finally:
            shutil.rmtree(scratch)
        with adapted.loaded():
            yield

    def part(self, name: str) -> Part:
        """An expert as a member; its name stands for its content, as all are from one testbed."""
        tensors = {kind: each[name] for kind, each in self.statistics.items()}
        return Part(name, name, self.arena.folders[name], tensors)

    def replies(self, prompts: Sequence[str]) -> list[str]:
        """What the model answers as it is now."""
        return answers(self.arena.model, self.arena.tokenizer, prompts, limit=LIMIT)

    def measure(self, kind: Statistic, names: Sequence[str]) -> None:
        """The statistics of these experts, on every linear layer, from their samples, with the expert loaded."""
        arena = self.arena
        modules = [name for name, layer in arena.model.named_modules() if isinstance(layer, nn.Linear)]
        modules = [name for name in modules if ".layers." in name]
        known = self.statistics.setdefault(kind, {})
        for name in names:
            samples = [Sample(prompt=row["prompt"], answer=row["answer"]) for row in self.samples(name)]
            known[name] = measure(arena.model, arena.tokenizer, arena.folders[name], samples, kind, modules=modules)

    def samples(self, name: str) -> list[dict[str, str]]:
        return read_jsonl(self.arena.data / "samples" / f"{name}.jsonl")

    def labelled(self, owners: Set) -> list[dict[str, str]]:
        """Prompts with answers, none of them measured on: an expert's samples, or further prompts of a composition."""
        if len(owners) == 1:
            return self.samples(owners[0])[:LABELLED]
        measured = {prompt.text for prompt in self.arena.prompts}
        composition = next(each for each in COMPOSITIONS if (each.first, each.second) == owners)
        fresh: dict[str, dict[str, str]] = {}
        for seed in itertools.count(1):
            fresh.update({row["prompt"]: row for row in composition.records(seed) if row["prompt"] not in measured})
            if len(fresh) >= LABELLED or seed == LABELLED:
                return list(fresh.values())[:LABELLED]
        raise AssertionError("never reached")

    def found(self, search: str, owners: Set, members: Set) -> tuple[float, ...]:
        """Weights that a search finds for `cat`: `soup` by exact match, `lorahub` by cross-entropy."""
        key = search, owners, members
        if key not in self._found:
            rows = self.labelled(owners)
            batch = self._batch(rows)

            def exact(weights: Sequence[float]) -> float:
                with self.loaded(Recipe(members, tuple(weights))):
                    said = self.replies([row["prompt"] for row in rows])
                return sum(reply == row["answer"] for reply, row in zip(said, rows, strict=True)) / len(rows)

            @torch.no_grad()
            def loss(weights: Sequence[float]) -> float:
                with self.loaded(Recipe(members, tuple(weights))):
                    return float(batch.loss(self.arena.model))

            found = soup(len(members), exact) if search == "soup" else lorahub(len(members), loss)
            self._found[key] = found.weights
        return self._found[key]

    def _batch(self, rows: Sequence[Mapping[str, str]]) -> Batch:
        return Batch.of([encode(self.arena.tokenizer, row["prompt"], row["answer"]) for row in rows])
