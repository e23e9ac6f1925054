"""Prompts that carry the markup of a chat template are read as the conversation that they are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.markup import turns_of
from router.text import routing_text

TALK = [("system", "Be brief."), ("user", "First"), ("assistant", "Yes?"), ("user", "Second")]


def chatml(role, content):
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def llama3(role, content):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"


def phi(role, content):
    return f"<|{role}|>\n{content}<|end|>\n"


def deepseek(role, content):
    bar = "\uff5c"
    end = f"<{bar}end\u2581of\u2581sentence{bar}>" if role == "assistant" else ""
    return content if role == "system" else f"<{bar}{role.title()}{bar}>{content}{end}"


def harmony(role, content):
    return f"<|start|>{role}<|message|>{content}<|end|>"


def granite(role, content):
    return f"<|start_of_role|>{role}<|end_of_role|>{content}<|end_of_text|>\n"


def command_r(role, content):
    name = {"assistant": "CHATBOT"}.get(role, role.upper())
    return f"<|START_OF_TURN_TOKEN|><|{name}_TOKEN|>{content}<|END_OF_TURN_TOKEN|>"


@pytest.mark.parametrize("template", [chatml, llama3, phi, deepseek, harmony, granite])
def test_turns_are_found_in_the_markup_of_a_template(template):
    marked = "<|begin_of_text|>" + "".join(template(*turn) for turn in TALK)
    assert [(turn["role"], turn["content"]) for turn in turns_of(marked)] == TALK
    assert routing_text({"prompt": marked}) == "Be brief.\n\nSecond"


def test_command_r_s_last_turn_is_found():
    marked = "<BOS_TOKEN>" + "".join(command_r(*turn) for turn in TALK)
    assert [turn["content"] for turn in turns_of(marked)] == ["Be brief.", "First", "Yes?", "Second"]
    assert routing_text({"prompt": f"{marked}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>No"}) == "Be brief.\n\nSecond"


def test_gemma_s_turns_are_found():
    marked = "<bos><start_of_turn>user\nFirst<end_of_turn>\n<start_of_turn>model\nYes?<end_of_turn>\n"
    assert [turn["role"] for turn in turns_of(marked)] == ["user", "model"]
    assert routing_text({"prompt": f"{marked}<start_of_turn>user\nSecond<end_of_turn>\n"}) == "Second"


def test_llama_2_s_turns_are_found():
    marked = "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nFirst [/INST] Yes? </s><s>[INST] Second [/INST]"
    assert [(turn["role"], turn["content"]) for turn in turns_of(marked)] == TALK


def test_what_an_assistant_is_made_to_say_is_not_read():
    """So that all choices of a question are answered by the same expert."""
    assert {routing_text({"prompt": f"<bos><|user|>Pick<|assistant|>{choice}"}) for choice in "abc"} == {"Pick"}


@given(st.text(alphabet=st.characters(exclude_characters="<[")))
def test_a_prompt_without_markup_has_no_turns(prompt):
    assert turns_of(prompt) == []


@pytest.mark.parametrize("prompt", ["a < b and b > c", "if x <| y |> z", "[1] and [INSTALL]", "<b>bold</b> <s>old</s>"])
def test_what_only_looks_like_markup_is_read_as_it_is(prompt):
    assert routing_text({"prompt": prompt}) == prompt
