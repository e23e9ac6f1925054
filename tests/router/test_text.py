from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.text import combine, routing_text, shorten

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(
                ["messages", "prompt", "input", "system", "instructions", "role", "content", "text", "type"]
            ),
            inner | st.sampled_from(["user", "system", "assistant"]),
            max_size=5,
        )
    ),
    max_leaves=20,
)


@pytest.mark.parametrize(
    ("request_body", "text"),
    [
        pytest.param({"messages": [{"role": "user", "content": "Hello"}]}, "Hello", id="chat"),
        pytest.param(
            {
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "First"},
                    {"role": "assistant", "content": "Answer"},
                    {"role": "user", "content": "Second"},
                ]
            },
            "Be brief.\n\nSecond",
            id="instruction and last user turn",
        ),
        pytest.param(
            {"messages": [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}]},
            "Be brief.\n\nHi",
            id="developer message",
        ),
        pytest.param(
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "What is this?"},
                            {"type": "image_url", "image_url": {"url": "data:..."}},
                            {"type": "text", "text": "Name it."},
                        ],
                    }
                ]
            },
            "What is this?\nName it.",
            id="text parts only",
        ),
        pytest.param(
            {
                "system": [{"type": "text", "text": "Be brief."}],
                "messages": [
                    {"role": "user", "content": "Use the tool"},
                    {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]},
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1"}]},
                ],
            },
            "Be brief.\n\nUse the tool",
            id="Anthropic, a tool result is not what the user said",
        ),
        pytest.param({"prompt": "Once upon"}, "Once upon", id="completions"),
        pytest.param({"prompt": "<|user|>Hi<|assistant|>Hello"}, "Hi", id="completions, a template applied"),
        pytest.param({"prompt": ["One", "Two"]}, "One\nTwo", id="completions, several prompts"),
        pytest.param({"prompt": [1, 2, 3]}, "", id="completions, token ids"),
        pytest.param({"input": "Hi", "instructions": "Be brief."}, "Be brief.\n\nHi", id="responses"),
        pytest.param(
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]},
            "Hi",
            id="responses, list of items",
        ),
        pytest.param([{"role": "user", "content": "Hi"}], "Hi", id="bare messages"),
        pytest.param("Hi", "Hi", id="bare prompt"),
        pytest.param({"messages": [{"role": "system", "content": "Only this"}]}, "Only this", id="no user"),
        pytest.param({"messages": [{"role": "user", "content": "  "}]}, "", id="blank"),
        pytest.param({"messages": []}, "", id="no messages"),
        pytest.param({}, "", id="nothing"),
        pytest.param(None, "", id="null"),
        pytest.param({"messages": "Hi"}, "Hi", id="messages as a string"),
        pytest.param({"messages": {"role": "user"}}, "", id="messages as an object"),
        pytest.param({"messages": [None, 3, {"role": "user", "content": {"text": 1}}]}, "", id="junk"),
    ],
)
def test_routing_text_is_the_instruction_and_the_last_thing_the_user_said(request_body: Any, text: str) -> None:
    assert routing_text(request_body) == text


@given(JSON, st.integers(0, 60))
def test_any_json_gives_a_text_within_the_budget(junk: Any, budget: int) -> None:
    assert len(routing_text(junk, budget)) <= budget


@given(st.text(max_size=200), st.integers(0, 250))
def test_shortening_keeps_short_texts_and_head_and_tail_of_long_ones(text: str, budget: int) -> None:
    short = shorten(text, budget)
    assert len(short) <= budget
    if len(text) <= budget:
        assert short == text
    elif budget >= 7:
        assert short.startswith(text[: (budget - 5) // 2])
        assert short.endswith(text[-((budget - 5) // 2) :])
        assert "..." in short


@given(st.text(max_size=100), st.text(max_size=100), st.integers(0, 220))
def test_both_parts_fit_the_budget_and_neither_is_cut_without_need(a: str, b: str, budget: int) -> None:
    text = combine(a, b, budget)
    assert len(text) <= budget
    if a and b and len(a) + len(b) + 2 <= budget:
        assert text == f"{a}\n\n{b}"


@pytest.mark.parametrize(
    "instruction",
    [
        "You are a helpful assistant.",
        "You are a helpful, honest and harmless AI assistant",
        "you're an AI language model.",
        "You are a friendly chatbot!\n",
    ],
)
def test_an_instruction_that_every_client_sends_is_left_out(instruction: str) -> None:
    request = {"system": instruction, "messages": [{"role": "user", "content": "Hi"}]}
    assert routing_text(request) == "Hi"


@pytest.mark.parametrize(
    "instruction",
    ["You are a translation assistant.", "You are a helpful assistant. Answer in French.", "You are a pirate."],
)
def test_an_instruction_that_says_something_is_kept(instruction: str) -> None:
    request = {"messages": [{"role": "system", "content": instruction}, {"role": "user", "content": "Hi"}]}
    assert routing_text(request) == f"{instruction}\n\nHi"


def test_a_long_document_does_not_push_out_its_instruction() -> None:
    text = combine("Summarise.", "word " * 1000, 200)
    assert text.startswith("Summarise.\n\n")
    assert len(text) == 200


def test_a_long_instruction_leaves_half_the_budget_to_the_prompt() -> None:
    text = combine("rule " * 1000, "word " * 1000, 202)
    instruction, prompt = text.split("\n\n")
    assert len(instruction) == len(prompt) == 100
