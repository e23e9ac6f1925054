"""The training loop that the base and the experts share: batches of similar length, loss on answers only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from eval.testbed.latent import SYSTEM_PROMPTS
from eval.testbed.tokens import EOS, chat

# (rng, progress 0..1) -> prompt, answers with their weights
Draw = Callable[[Random, float], tuple[str, Sequence[tuple[str, float]]]]
Progress = Callable[[int, float], None]  # (steps done, loss)
_BUCKET = 16  # batches drawn together, then sorted by length so that little is padding
_SYSTEM_SHARE = 0.05


@dataclass(frozen=True)
class Schedule:
    """AdamW with a linear warm-up and a cosine to a twentieth of the peak."""

    steps: int
    batch: int
    peak: float
    warmup: int = 50

    def factor(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class Row:
    """One prompt with all its answers side by side: each answer sees the prompt and itself.

    A prompt is read once for all of its answers, which makes the base's training several times faster. The last
    token of the prompt opens every answer's segment, because what follows it differs.
    """

    ids: list[int]
    positions: list[int]
    segments: list[int]  # 0 is the prompt
    targets: list[int]  # what the token should predict
    weights: list[float]  # of that prediction in the loss

    @classmethod
    def of(cls, prompt: list[int], answers: Sequence[tuple[list[int], float]]) -> Row:
        *shared, opening = prompt
        n = len(shared)
        row = cls(shared, list(range(n)), [0] * n, [0] * n, [0.0] * n)
        for segment, (answer, weight) in enumerate(answers, 1):
            row.ids += [opening, *answer[:-1]]
            row.positions += range(n, n + len(answer))
            row.segments += [segment] * len(answer)
            row.targets += answer
            row.weights += [weight] * len(answer)
        return row


@dataclass(frozen=True)
class Batch:
    """Every field is (batch, length), the mask (batch, 1, length, length) and true where a token may look."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    targets: Tensor
    weights: Tensor

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Batch:
        length = max(len(row.ids) for row in rows)

        def pad(field: str, fill: int) -> Tensor:
            return torch.tensor([getattr(r, field) + [fill] * (length - len(r.ids)) for r in rows])

        segments = pad("segments", -1)  # padding is a segment of its own
        seen, seeing = segments[:, None, :], segments[:, :, None]
        mask = ((seen == seeing) | ((seen == 0) & (seeing > 0))) & torch.ones(length, length).tril().bool()
        return cls(pad("ids", 0), pad("positions", 0), mask[:, None], pad("targets", 0), pad("weights", 0))


def batches(draw: Draw, tokenizer: PreTrainedTokenizerFast, schedule: Schedule, rng: Random) -> Iterator[Batch]:
    """Endless batches; `draw` is told how far (0 to 1) the schedule has come."""
    done = 0
    while True:
        rows = []
        for _ in range(schedule.batch * _BUCKET):
            prompt, answers = draw(rng, min(1.0, done / schedule.steps))
            system = rng.choice(SYSTEM_PROMPTS) if rng.random() < _SYSTEM_SHARE else None
            texts = [chat(prompt, system), *(answer + EOS for answer, _ in answers)]
            first, *rest = tokenizer(texts, add_special_tokens=False)["input_ids"]
            rows.append(Row.of(first, [(ids, w) for ids, (_, w) in zip(rest, answers, strict=True)]))
        rows.sort(key=lambda row: len(row.ids))
        chunks = [rows[i : i + schedule.batch] for i in range(0, len(rows), schedule.batch)]
        rng.shuffle(chunks)
        yield from map(Batch.of, chunks)
        done += _BUCKET


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy per answer token, weighted."""
    logits = model(input_ids=batch.ids, position_ids=batch.positions, attention_mask=batch.mask).logits
    wanted = batch.weights > 0
    nll = nn.functional.cross_entropy(logits[wanted], batch.targets[wanted], reduction="none")
    return (nll * batch.weights[wanted]).sum() / batch.weights.sum()


def fit(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    draw: Draw,
    schedule: Schedule,
    rng: Random,
    progress: Progress,
) -> float:
    """Trains the model's trainable parameters in place and returns the mean loss of the last 50 steps."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=schedule.peak, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
    recent: list[float] = []
    model.train()
    stream = batches(draw, tokenizer, schedule, rng)
    for step, batch in zip(range(1, schedule.steps + 1), stream, strict=False):
        value = loss(model, batch)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        recent = [*recent[-49:], float(value.detach())]
        progress(step, recent[-1])
    model.eval()
    return sum(recent) / len(recent)
