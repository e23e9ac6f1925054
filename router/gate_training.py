"""Gate vectors that are trained: PHATGOOSE (one expert at a time) and MeteoRA (several experts together).

Experts and base model are frozen. What is trained are vectors `(d_in,)`, one for each expert and module it adapts, to
be kept with the expert's version under the gate's name (docs/registry.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from router.adapter import Adapter

Progress = Callable[[int, float], None]  # (steps done, loss)
Vectors = dict[str, Tensor]  # module -> (d_in,)
Example = tuple[list[int], int]  # tokens, how many of them are the prompt


@dataclass(frozen=True)
class Schedule:
    """Steps of AdamW at a constant rate, on so many samples of an expert each (PHATGOOSE, section 4.3)."""

    steps: int = 100
    batch: int = 8
    rate: float = 5e-3
    seed: int = 0


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


def train_phatgoose(
    model: nn.Module, expert: Path, samples: Sequence[Example], schedule: Schedule, progress: Progress
) -> Vectors:
    """v of every module in `y = W x + sigmoid(v . x) dW x`, from zero, by the loss on the expert's own answers."""
    adapted = _Adapted(model, expert)
    vectors = {name: torch.zeros(d_in, requires_grad=True) for name, d_in in adapted.inputs.items()}
    optimizer = torch.optim.AdamW(vectors.values(), lr=schedule.rate)

    def gated(name: str, x: Tensor, delta: Tensor) -> Tensor:
        return torch.sigmoid(x @ vectors[name].to(x))[..., None] * delta

    with _frozen(model), adapted.hooked(gated):
        for step, batch in enumerate(_batches(samples, schedule), 1):
            loss = _answer_loss(model, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            progress(step, float(loss.detach()))
    return {name: vector.detach() for name, vector in vectors.items()}


def train_meteora(
    model: nn.Module,
    experts: Mapping[str, Path],
    samples: Mapping[str, Sequence[Example]],
    schedule: Schedule,
    progress: Progress,
) -> dict[str, Vectors]:
    """w_k of every module in `softmax_k(w_k . x)`, by cross-entropy: which expert's sample a token is from.

    x is what the module gets while that expert answers. An expert that does not adapt a module has no part in it.
    """
    adapted = {name: _Adapted(model, folder) for name, folder in experts.items()}
    vectors = {
        name: {m: torch.zeros(d, requires_grad=True) for m, d in each.inputs.items()} for name, each in adapted.items()
    }
    optimizer = torch.optim.AdamW([v for each in vectors.values() for v in each.values()], lr=schedule.rate)
    streams = {name: _batches(samples[name], schedule) for name in experts}
    with _frozen(model):
        for step in range(1, schedule.steps + 1):
            losses: list[float] = []
            for name in experts:
                _read_as(model, name, adapted[name], next(streams[name]), vectors, losses)
            for each in itertools.chain(*(mine.values() for mine in vectors.values())):
                if each.grad is not None:
                    each.grad /= len(experts)
            optimizer.step()
            optimizer.zero_grad()
            progress(step, sum(losses) / max(len(losses), 1))
    return {name: {module: vector.detach() for module, vector in each.items()} for name, each in vectors.items()}


def _read_as(
    model: nn.Module,
    name: str,
    adapted: _Adapted,
    batch: _Batch,
    vectors: Mapping[str, Vectors],
    losses: list[float],
) -> None:
    """One expert reads a batch of its own samples; the gate of every module it adapts learns to tell."""

    def learn(module: str, x: Tensor, delta: Tensor) -> Tensor:
        rivals = [other for other, theirs in vectors.items() if module in theirs]
        if len(rivals) > 1:
            with torch.enable_grad():
                w = torch.stack([vectors[other][module] for other in rivals])  # (K, d_in)
                scores = x[batch.mask.to(x.device)].float() @ w.T  # (tokens, K)
                target = torch.full((len(scores),), rivals.index(name))
                loss = nn.functional.cross_entropy(scores, target)
                loss.backward()  # type: ignore[no-untyped-call]
            losses.append(float(loss.detach()))
        return delta

    with torch.no_grad(), adapted.hooked(learn):
        model(input_ids=batch.ids, attention_mask=batch.mask.long())


class _Adapted:
    """An expert on a model, through hooks."""

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


@dataclass(frozen=True)
class _Batch:
    """Padded on the right; all (batch, length): tokens, which are no padding, which belong to the answer."""

    ids: Tensor
    mask: Tensor
    answer: Tensor


def _batches(samples: Sequence[Example], schedule: Schedule) -> Iterator[_Batch]:
    """`schedule.steps` batches: the samples again and again, each time in another order."""
    rng = Random(schedule.seed)
    endless = (each for _ in itertools.count() for each in rng.sample(list(samples), len(samples)))
    for _ in range(schedule.steps):
        rows = list(itertools.islice(endless, schedule.batch))
        length = max(len(tokens) for tokens, _ in rows)
        place = torch.arange(length)
        total = torch.tensor([len(tokens) for tokens, _ in rows])[:, None]
        prompt = torch.tensor([n for _, n in rows])[:, None]
        ids = torch.tensor([tokens + [0] * (length - len(tokens)) for tokens, _ in rows])
        yield _Batch(ids, place < total, (place >= prompt) & (place < total))


def _answer_loss(model: nn.Module, batch: _Batch) -> Tensor:
    """Mean cross-entropy of the answers' tokens."""
    logits = model(input_ids=batch.ids, attention_mask=batch.mask.long()).logits[:, :-1]
    wanted = batch.answer[:, 1:]
    return nn.functional.cross_entropy(logits[wanted].float(), batch.ids[:, 1:][wanted])


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)
