"""Batched greedy generation in process: the slow, plain twin of what a server does with the same adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from eval.testbed.tokens import chat


@torch.inference_mode()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    batch: int = 128,
    limit: int = 32,
) -> list[str]:
    """The most likely answer to each prompt, one user turn each, at most `limit` tokens long."""
    texts = [chat(prompt) for prompt in prompts]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # similar lengths: little padding
    replies = [""] * len(texts)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        tokens = _greedy(model, tokenizer, [texts[i] for i in chosen], limit)
        for i, text in zip(chosen, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
            replies[i] = text.strip()
    return replies


def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[str], limit: int) -> Tensor:
    """New tokens (batch, <= limit); rows are padded after their end of text."""
    encoded = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")  # left padding
    eos, pad = cast(int, tokenizer.eos_token_id), cast(int, tokenizer.pad_token_id)
    ids, mask, cache = encoded["input_ids"], encoded["attention_mask"], None
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    ended = torch.zeros(len(texts), dtype=torch.bool)
    new: list[Tensor] = []
    for _ in range(limit):
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        token = output.logits[:, -1].argmax(-1).masked_fill(ended, pad)  # (batch,)
        new.append(token)
        ended |= token == eos
        if ended.all():
            break
        ids, positions = token[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(texts), 1)], dim=1)
    return torch.stack(new, dim=1)
