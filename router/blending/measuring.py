"""The statistics of an expert that `regmean` and `fisher` need, from its samples.

As published, the expert is loaded while its own samples are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from adapters_registry.expert import Sample
from router.adapted import Adapted, Batch, Example, device_of, encode, frozen
from router.blending.operator import Statistic
from router.blending.statistics import fisher_information, gram_matrices

#: Samples in one pass; Fisher information takes them one by one.
WIDTH = 8


def measure(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    samples: Sequence[Sample],
    kind: Statistic,
    tell: Callable[[int], None] = lambda done: None,
    modules: Sequence[str] | None = None,
) -> dict[str, Tensor]:
    """{module: statistic} of the expert's modules, or of others; `gram` takes samples without an answer, too.

    `tell` is told how many samples have been read. Raises ValueError.
    """
    adapted = Adapted(model, folder)
    usable = [each for each in samples if kind == "gram" or each.answer]
    width = WIDTH if kind == "gram" else 1
    batches = _batches(model, [_example(tokenizer, each) for each in usable], width, tell)
    of = gram_matrices if kind == "gram" else fisher_information
    with frozen(model), adapted.loaded():
        return of(model, batches, list(adapted.inputs) if modules is None else modules)


def _example(tokenizer: Any, sample: Sample) -> Example:
    tokens, prompt = encode(tokenizer, sample.prompt, sample.answer or "")
    return (tokens if sample.answer else tokens[:prompt]), prompt


def _batches(
    model: nn.Module, examples: Sequence[Example], width: int, tell: Callable[[int], None]
) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(examples), width):
        batch = Batch.of(examples[start : start + width], device_of(model))
        labels = batch.ids.masked_fill(~batch.answer, -100)
        yield {"input_ids": batch.ids, "attention_mask": batch.mask.long(), "labels": labels}
        tell(min(start + width, len(examples)))
