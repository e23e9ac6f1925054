from __future__ import annotations

import torch
from transformers import GenerationConfig

from eval.testbed.build import make_base
from eval.testbed.generate import answers
from eval.testbed.tokens import chat, make_tokenizer


def test_a_batch_with_padding_answers_as_the_models_own_generation_one_by_one() -> None:
    torch.manual_seed(1)
    tokenizer = make_tokenizer()
    model = make_base(tokenizer).eval()
    prompts = ["a", "Spell banana backwards", "What is the capital of France?", "b" * 60]
    config = GenerationConfig(
        do_sample=False, max_new_tokens=8, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    expected = []
    for prompt in prompts:
        encoded = tokenizer(chat(prompt), add_special_tokens=False, return_tensors="pt")
        encoded.pop("token_type_ids", None)
        ids = model.generate(**encoded, generation_config=config)[0, encoded["input_ids"].shape[1] :]
        expected.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
    assert answers(model, tokenizer, prompts, batch=3, limit=8) == expected


def test_no_prompts_give_no_answers() -> None:
    tokenizer = make_tokenizer()
    assert answers(make_base(tokenizer).eval(), tokenizer, []) == []
