"""The base model in this process with an adapter on it, and samples as it reads them: for work ahead of serving."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from router.adapter import Adapter

Example = tuple[list[int], int]  # tokens, how many of them are the prompt


def encode(tokenizer: Any, prompt: str, answer: str) -> Example:
    """A sample as the chat template writes it; without one, the prompt and a new line."""
    if getattr(tokenizer, "chat_template", None):
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        before = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        before = tokenizer(prompt + "\n")["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return before + tokenizer(answer, add_special_tokens=False)["input_ids"] + end, len(before)


@dataclass(frozen=True)
class Batch:
    """Padded on the right; all (batch, length): tokens, which are no padding, which belong to the answer."""

    ids: Tensor
    mask: Tensor
    answer: Tensor

    @classmethod
    def of(cls, rows: Sequence[Example], device: torch.device | str = "cpu") -> Batch:
        length = max(len(tokens) for tokens, _ in rows)
        place = torch.arange(length, device=device)
        total = torch.tensor([len(tokens) for tokens, _ in rows], device=device)[:, None]
        prompt = torch.tensor([n for _, n in rows], device=device)[:, None]
        ids = torch.tensor([tokens + [0] * (length - len(tokens)) for tokens, _ in rows], device=device)
        return cls(ids, place < total, (place >= prompt) & (place < total))

    def logits(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """(answer tokens, vocabulary) logits of every answer token in the batch, and (answer tokens,) what they are."""
        logits = model(input_ids=self.ids, attention_mask=self.mask.long()).logits[:, :-1]
        wanted = self.answer[:, 1:]
        return logits[wanted].float(), self.ids[:, 1:][wanted]

    def loss(self, model: nn.Module) -> Tensor:
        """Mean cross-entropy of the answers' tokens."""
        return nn.functional.cross_entropy(*self.logits(model))


class Adapted:
    """An expert on a model, through hooks: the model's own weights stay as they are."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        adapter = Adapter(folder)
        self._model = model
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.inputs: dict[str, int] = {}  # module -> d_in
        for name in adapter.modules:
            factors = adapter.factors(name)
            assert factors is not None
            self._factors[name] = (factors.A.float(), factors.B.float())
            self.inputs[name] = factors.A.shape[1]

    @contextmanager
    def hooked(self, change: Callable[[str, Tensor, Tensor], Tensor]) -> Iterator[None]:
        """Every adapted module adds `change(name, x, dW x)` to its output."""

        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
            A, B = self._factors[name]

            def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
                x = inputs[0]
                return output + change(name, x, x @ A.to(x).T @ B.to(x).T)

            return add

        handles = [self._model.get_submodule(name).register_forward_hook(hook(name)) for name in self._factors]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def loaded(self) -> AbstractContextManager[None]:
        """y = W x + dW x in every adapted module, as an engine has it."""
        return self.hooked(lambda name, x, delta: delta)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No weight of the model asks for a gradient."""
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)
