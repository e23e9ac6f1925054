"""How good a blend is on a labelled set: the base model in this process with the blend on it, as it would be served."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from pydantic import ValidationError
from torch import nn

from adapters_registry.expert import Sample
from router.adapted import Adapted, Batch, Example, device_of

#: Examples in one pass.
WIDTH = 16
#: Bad rows that are named.
NAMED = 5


class BadRows(ValueError):
    """A labelled set that cannot be read: every bad row (the first few) by file and line."""


def read_labelled(path: Path) -> list[Sample]:
    """Rows of {prompt, answer}, JSON, one a line; empty lines do not count. Raises BadRows, OSError."""
    rows: list[Sample] = []
    bad: list[str] = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line.strip():
            try:
                rows.append(_row(line))
            except ValueError as error:
                bad.append(f"{path}:{number}: {_why(error)}")
    if bad:
        more = [f"... and {len(bad) - NAMED} more rows"] if len(bad) > NAMED else []
        raise BadRows("\n".join([*bad[:NAMED], *more]))
    if not rows:
        raise BadRows(f'{path} is empty; it needs rows like {{"prompt": "...", "answer": "..."}}.')
    return rows


def _row(line: bytes) -> Sample:
    value = json.loads(line.decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError("not an object with 'prompt' and 'answer'")
    row = Sample.model_validate(value)
    if not row.answer:
        raise ValueError("it has no 'answer'")
    return row


def _why(error: ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error}"
    if isinstance(error, ValidationError):
        return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
    return str(error)


class Judgement(NamedTuple):
    """loss   mean cross-entropy of the answers' tokens, in nats
    exact  the share of rows that greedy decoding answers exactly
    """

    loss: float
    exact: float


@dataclass(frozen=True, eq=False)
class Judge:
    """`build(weights, folder)` writes a blend; all are written to the same `folder`, one after the other."""

    model: nn.Module
    examples: Sequence[Example]
    build: Callable[[Sequence[float], Path], object]
    folder: Path

    def __call__(self, weights: Sequence[float]) -> Judgement:
        """Weights that are all zero are the base model."""
        if not any(weights):
            return self._judge(None)
        self.build(weights, self.folder)
        try:
            return self._judge(self.folder)
        finally:
            shutil.rmtree(self.folder)

    @torch.inference_mode()
    def _judge(self, folder: Path | None) -> Judgement:
        """One pass tells both: greedy decoding gives an answer exactly if each of its tokens, given those before, is
        the likeliest.
        """
        loss, tokens, right = 0.0, 0, 0
        with nullcontext() if folder is None else Adapted(self.model, folder).loaded():
            for start in range(0, len(self.examples), WIDTH):
                batch = Batch.of(self.examples[start : start + WIDTH], device_of(self.model))
                logits, wanted = batch.logits(self.model)  # (answer tokens, vocabulary), (answer tokens,)
                loss += float(nn.functional.cross_entropy(logits.double(), wanted, reduction="sum"))
                tokens += len(wanted)
                likeliest = iter((logits.argmax(-1) == wanted).tolist())
                right += sum(all(list(itertools.islice(likeliest, n))) for n in batch.answer[:, 1:].sum(1).tolist())
        return Judgement(loss / tokens, right / len(self.examples))
