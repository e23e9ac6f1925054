"""Batched greedy generation in process: the slow, plain twin of what a server does with the same adapters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from eval.greedy import greedy, step
from eval.testbed.tokens import chat


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
        encoded = tokenizer([texts[i] for i in chosen], add_special_tokens=False)["input_ids"]
        eos = cast(int, tokenizer.eos_token_id)
        tokens = greedy(partial(step, model), encoded, limit=limit, eos=(eos,))
        for i, text in zip(chosen, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
            replies[i] = text.strip()
    return replies
