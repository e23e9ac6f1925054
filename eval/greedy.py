"""Greedy decoding in batches on Transformers, whatever is hooked into the model meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

#: ids (batch, length), mask (batch, all so far), cache -> logits (batch, length, vocabulary), cache.
Step = Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]]


def step(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
    """A `Step` of a model; mask is 0 where there is only padding, on the left."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    output = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    return output.logits, output.past_key_values


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """ids and mask, both (batch, longest), with padding on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, mask


@torch.inference_mode()
def greedy(
    step: Step,
    prompts: Sequence[Sequence[int]],
    *,
    limit: int,
    eos: Collection[int] = (),
    ended: Callable[[Sequence[int]], bool] = lambda tokens: False,
) -> list[list[int]]:
    """The likeliest tokens after each prompt, at most `limit`, up to and without one of `eos`; all in one batch.

    A row whose new tokens have `ended` gets no more.
    """
    ids, mask = padded(prompts)
    new: list[list[int]] = [[] for _ in prompts]
    live, cache = [True] * len(prompts), None
    for _ in range(limit):
        logits, cache = step(ids, mask, cache)
        tokens = logits[:, -1].argmax(-1)  # (batch,)
        for row, token in enumerate(tokens.tolist()):
            live[row] = live[row] and token not in eos
            if live[row]:
                new[row].append(token)
                live[row] = not ended(new[row])
        if not any(live):
            break
        ids = tokens[:, None]
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], 1)
    return new
