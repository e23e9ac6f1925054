"""Gate vectors that are trained: PHATGOOSE (one expert at a time) and MeteoRA (several experts together).

Experts and base model are frozen. What is trained are vectors `(d_in,)`, one for each expert and module it adapts, to
be kept with the expert's version under the gate's name (docs/registry.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor, nn

from router.adapted import Adapted, Batch, Example, device_of, frozen

Progress = Callable[[int, float], None]  # (steps done, loss)
Vectors = dict[str, Tensor]  # module -> (d_in,)


@dataclass(frozen=True)
class Schedule:
    """Steps of AdamW at a constant rate, on so many samples of an expert each (PHATGOOSE, section 4.3)."""

    steps: int = 100
    batch: int = 8
    rate: float = 5e-3
    seed: int = 0


def train_phatgoose(
    model: nn.Module, expert: Path, samples: Sequence[Example], schedule: Schedule, progress: Progress
) -> Vectors:
    """v of every module in `y = W x + sigmoid(v . x) dW x`, from zero, by the loss on the expert's own answers."""
    adapted = Adapted(model, expert)
    vectors = {name: torch.zeros(d_in, requires_grad=True) for name, d_in in adapted.inputs.items()}
    optimizer = torch.optim.AdamW(vectors.values(), lr=schedule.rate)

    def gated(name: str, x: Tensor, delta: Tensor) -> Tensor:
        return torch.sigmoid(x @ vectors[name].to(x))[..., None] * delta

    with frozen(model), adapted.hooked(gated):
        for step, batch in enumerate(_batches(samples, schedule, device_of(model)), 1):
            loss = batch.loss(model)
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
    adapted = {name: Adapted(model, folder) for name, folder in experts.items()}
    vectors = {
        name: {m: torch.zeros(d, requires_grad=True) for m, d in each.inputs.items()} for name, each in adapted.items()
    }
    optimizer = torch.optim.AdamW([v for each in vectors.values() for v in each.values()], lr=schedule.rate)
    streams = {name: _batches(samples[name], schedule, device_of(model)) for name in experts}
    with frozen(model):
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
    adapted: Adapted,
    batch: Batch,
    vectors: Mapping[str, Vectors],
    losses: list[float],
) -> None:
    """One expert reads a batch of its own samples; the gate of every module it adapts learns to tell."""

    def learn(module: str, x: Tensor, delta: Tensor) -> Tensor:
        rivals = [other for other, theirs in vectors.items() if module in theirs]
        if len(rivals) > 1:
            with torch.enable_grad():
                w = torch.stack([vectors[other][module] for other in rivals]).to(x.device)  # (K, d_in)
                scores = x[batch.mask].float() @ w.T  # (tokens, K)
                target = torch.full((len(scores),), rivals.index(name), device=x.device)
                loss = nn.functional.cross_entropy(scores, target)
                loss.backward()  # type: ignore[no-untyped-call]
            losses.append(float(loss.detach()))
        return delta

    with torch.no_grad(), adapted.hooked(learn):
        model(input_ids=batch.ids, attention_mask=batch.mask.long())


def _batches(samples: Sequence[Example], schedule: Schedule, device: torch.device) -> Iterator[Batch]:
    """`schedule.steps` batches: the samples again and again, each time in another order."""
    rng = Random(schedule.seed)
    endless = (each for _ in itertools.count() for each in rng.sample(list(samples), len(samples)))
    for _ in range(schedule.steps):
        rows = list(itertools.islice(endless, schedule.batch))
        yield Batch.of(rows, device)
