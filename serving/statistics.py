"""Statistics of experts, which the operators `regmean` and `fisher` need: measured on their samples, kept with them.

As published, the expert is loaded while its own samples are read. They are as large as the weights that it adapts:
for every adapted module a Gram matrix (d_in, d_in), or the Fisher information's diagonal (d_out, d_in), float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn

from adapters_registry.expert import Expert, Sample
from adapters_registry.registry import Registry
from adapters_registry.tensors import LIMIT, FloatArray
from router.adapted import Adapted, Batch, Example, device_of, encode, frozen
from router.adapter import Adapter
from router.blending.operator import Statistic
from router.blending.statistics import fisher_information, gram_matrices

KINDS: tuple[Statistic, ...] = get_args(Statistic)
#: Samples in one pass; Fisher information takes them one by one.
WIDTH = 8

Tell = Callable[[int], None]  # samples read so far


def reason_against(expert: Expert, kind: Statistic) -> str | None:
    """Why these statistics cannot be had; None when they can."""
    if not expert.samples:
        return "it has no samples"
    if kind == "fisher" and not any(sample.answer for sample in expert.samples):
        return "none of its samples has an answer, which Fisher information is about"
    shapes = list(shapes_of(expert.path, kind).values())
    size = 4 * sum(map(math.prod, shapes))
    if size > LIMIT:
        largest = " x ".join(map(str, max(shapes, key=math.prod)))
        return (
            f"they would take {size / 2**20:,.0f} MiB ({len(shapes)} matrices of up to {largest}), more than the "
            f"{LIMIT >> 20} MiB that the registry keeps"
        )
    return None


def shapes_of(folder: Path, kind: Statistic) -> dict[str, tuple[int, int]]:
    """{module: (d_in, d_in)} for `gram`, {module: (d_out, d_in)} for `fisher`."""
    adapter = Adapter(folder)
    shapes = {module: adapter.shape(module) for module in adapter.modules}
    return {module: (d_in if kind == "gram" else d_out, d_in) for module, (d_out, d_in) in shapes.items()}


def is_measured(registry: Registry, expert: Expert, kind: Statistic) -> bool:
    """Whether the statistics are there, and its samples have not been changed since."""
    if kind not in registry.tensor_keys(expert.name, expert.version):
        return False
    for event in reversed(registry.events(expert.name)):
        if event.version == expert.version:
            if event.action == "tensors" and event.detail["key"] == kind:
                return True
            if event.action == "update" and "samples" in event.detail["fields"]:
                return False
    return True


def measure(model: nn.Module, tokenizer: Any, expert: Expert, kind: Statistic, tell: Tell) -> dict[str, FloatArray]:
    """{module: statistic} on the samples; `gram` takes those without an answer, too. Raises ValueError."""
    adapted = Adapted(model, expert.path)
    samples = [each for each in expert.samples if kind == "gram" or each.answer]
    width = WIDTH if kind == "gram" else 1
    batches = _batches(model, [_example(tokenizer, each) for each in samples], width, tell)
    of = gram_matrices if kind == "gram" else fisher_information
    with frozen(model), adapted.loaded():
        return {name: matrix.cpu().numpy() for name, matrix in of(model, batches, list(adapted.inputs)).items()}


def _example(tokenizer: Any, sample: Sample) -> Example:
    tokens, prompt = encode(tokenizer, sample.prompt, sample.answer or "")
    return (tokens if sample.answer else tokens[:prompt]), prompt


def _batches(model: nn.Module, examples: Sequence[Example], width: int, tell: Tell) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(examples), width):
        batch = Batch.of(examples[start : start + width], device_of(model))
        labels = batch.ids.masked_fill(~batch.answer, -100)
        yield {"input_ids": batch.ids, "attention_mask": batch.mask.long(), "labels": labels}
        tell(min(start + width, len(examples)))
