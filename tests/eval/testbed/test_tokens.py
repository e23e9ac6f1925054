from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from eval.testbed.tokens import chat, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def test_printable_ascii_survives_a_round_trip(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "\n".join(["".join(map(chr, range(32, 127))), "  two  spaces ", ""])
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text


def test_other_characters_become_unknown_and_break_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("né\t🙂", add_special_tokens=False)["input_ids"]
    assert ids[1:] == [tokenizer.unk_token_id] * 3


def test_plain_text_starts_with_the_begin_token(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


@pytest.mark.parametrize("system", [None, "Answer briefly."])
def test_training_prompts_are_what_the_chat_template_makes(
    tokenizer: PreTrainedTokenizerFast, system: str | None
) -> None:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": " Spell banana backwards\n"})
    made = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert made == chat("Spell banana backwards", system)


def test_a_conversation_ends_each_answer_and_opens_the_next(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    made = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert made == "<bos><|user|>a<|assistant|>b<eos><|user|>c<|assistant|>"


def test_a_saved_tokenizer_loads_as_the_same(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    prompt = chat("Hi, 1 + 2?")
    assert loaded(prompt)["input_ids"] == tokenizer(prompt)["input_ids"]
    assert loaded.chat_template == tokenizer.chat_template
