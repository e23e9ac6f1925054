"""The statistics that `fisher` and `regmean` need, from an expert's samples.

They are as large as the weights: for every module a matrix (d_in, d_in) or (d_out, d_in).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Module

Batch = Mapping[str, Tensor]  # what the model is called with: input_ids (b, t), attention_mask, labels


@torch.no_grad()
def gram_matrices(model: Module, batches: Iterable[Batch], modules: Sequence[str]) -> dict[str, Tensor]:
    """{module: sum of x x^T over the tokens / their number}, (d_in, d_in) float32; x is the module's input.

    Padding (attention_mask 0) does not count. `model` is a causal language model of transformers, with the expert
    loaded (as the paper has it) or without.
    """
    sums: dict[str, Tensor] = {}
    tokens = 0
    mask = torch.empty(0)

    def see(name: str, x: Tensor) -> None:
        rows = x[mask.bool()].double()  # (tokens, d_in)
        sums[name] = sums.get(name, 0) + rows.mT @ rows

    with _watched(model, modules, lambda name, module, inputs, output: see(name, inputs[0])):
        for batch in batches:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            tokens += int(mask.sum())
            model(**{key: value for key, value in batch.items() if key != "labels"})
    if not tokens:
        raise ValueError("There are no samples to measure inputs on; give the expert at least one.")
    return {name: (total / tokens).float() for name, total in sums.items()}


def fisher_information(model: Module, samples: Iterable[Batch], modules: Sequence[str]) -> dict[str, Tensor]:
    """{module: mean over samples of (d log p(answer) / dW)^2}, (d_out, d_in) float32: the empirical Fisher's diagonal.

    Every batch holds one sample with `labels`, -100 where nothing is predicted. The gradient of W is that of the output
    times the input, summed over the tokens, so that no weight needs to be trainable.
    """
    sums: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    count = 0

    def see(name: str, module: Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        inputs[name] = arguments[0].detach()
        if not output.requires_grad:
            output.requires_grad_()
        output.register_hook(lambda gradient: gradients.__setitem__(name, gradient))  # type: ignore[no-untyped-call]

    with _watched(model, modules, see), torch.enable_grad():
        for sample in samples:
            if "labels" not in sample or len(sample["input_ids"]) != 1:
                raise ValueError("Fisher information needs one sample with labels at a time.")
            predicted = int((sample["labels"][:, 1:] != -100).sum())
            if not predicted:
                raise ValueError("A sample has no answer to predict; Fisher information needs samples with answers.")
            loss = model(**sample).loss * predicted  # transformers gives the mean over what is predicted
            model.zero_grad(set_to_none=True)
            loss.backward()
            for name, gradient in gradients.items():
                weight = gradient[0].double().mT @ inputs[name][0].double()  # (d_out, d_in)
                sums[name] = sums.get(name, 0) + weight.square()
            gradients.clear()
            count += 1
    model.zero_grad(set_to_none=True)
    if not count:
        raise ValueError("There are no samples to measure gradients on; give the expert at least one with an answer.")
    return {name: (total / count).float() for name, total in sums.items()}


@contextmanager
def _watched(model: Module, modules: Sequence[str], hook: Callable[[str, Module, Any, Any], None]) -> Iterator[None]:
    """Call `hook(name, module, inputs, output)` after each of these linear layers. Raises ValueError for others."""
    found = dict(model.named_modules())
    handles = []
    try:
        for name in modules:
            layer = found.get(name)
            inner = getattr(layer, "base_layer", layer)  # PEFT wraps the layers that it adapts
            if not isinstance(inner, Linear):
                raise ValueError(f"The model has no linear layer '{name}'.")

            def call(module: Module, inputs: Any, output: Any, name: str = name) -> None:
                hook(name, module, inputs, output)

            assert layer is not None
            handles.append(layer.register_forward_hook(call))
        yield
    finally:
        for handle in handles:
            handle.remove()
