"""`moerge route` and `moerge chat`."""

from __future__ import annotations

import json

REVERSE = "spell cherry backwards"


def test_a_decision_is_explained(served):
    result = served.moerge("route", REVERSE)
    assert result.exit_code == 0
    assert "select: reverse (1.00)" in result.stdout
    for part in ("confidence", "encode", "reverse v1", "count v1", "threshold"):
        assert part in result.stdout


def test_a_decision_is_printed_as_json(served):
    body = json.loads(served.moerge("route", REVERSE, "--json").stdout)
    assert body["decision"]["experts"][0]["expert"] == "reverse"


def test_a_system_message_is_part_of_what_is_routed(served):
    body = json.loads(served.moerge("route", "cherry", "--system", "spell backwards", "--json").stdout)
    assert body["text"] == "spell backwards\n\ncherry"


def test_a_gate_s_weights_are_shown(served):
    result = served.moerge("route", REVERSE, "--model", "auto:arrow", "--trace")
    assert "gate: count (0.33), reverse (0.33), shout (0.33)" in result.stdout
    for part in ("mean weight", "0.333", "arrow, 3 tokens"):
        assert part in result.stdout
    assert "mean weight" not in served.moerge("route", REVERSE, "--trace").stdout


def test_abstaining_says_why(served):
    result = served.moerge("route", "zebra quartz")
    assert "base: the base model" in result.stdout
    assert "under the threshold" in " ".join(result.stdout.split())


def test_a_server_s_refusal_is_the_message(served):
    result = served.moerge("route", REVERSE, "--model", "unheard-of")
    assert result.exit_code == 1
    assert "The model 'unheard-of' does not exist" in result.stderr
    assert "Traceback" not in result.output


def test_an_answer_is_printed_with_who_gave_it(served):
    result = served.moerge("chat", REVERSE)
    assert result.stdout == f"reverse {REVERSE} \n"
    assert "(reverse=1, confidence 0." in result.stderr or "(reverse=1, confidence 1." in result.stderr


def test_an_answer_of_the_base_model_says_so(served):
    assert "(the base model" in served.moerge("chat", "zebra quartz").stderr


def test_options_reach_the_engine(served):
    words = ("--model", "shout", "--system", "be brief", "--max-tokens", "7", "--temperature", "0")
    assert served.moerge("chat", "x", *words).stdout == "shout x \n"
    body = served.engine.asked[-1].body
    assert body["messages"][0] == {"role": "system", "content": "be brief"}
    assert (body["max_tokens"], body["temperature"], body["stream"]) == (7, 0, True)


def test_a_conversation_remembers_what_was_said(served):
    result = served.moerge("chat", "--model", "tiny", input="one\ntwo\n")
    assert result.exit_code == 0
    assert result.stdout == "tiny one \ntiny two \n"
    assert [each["role"] for each in served.engine.asked[-1].body["messages"]] == ["user", "assistant", "user"]


def test_chat_with_an_unknown_model_is_one_message(served):
    result = served.moerge("chat", "x", "--model", "unheard-of")
    assert result.exit_code == 1
    assert "The model 'unheard-of' does not exist" in result.stderr


def test_a_wrong_url_is_one_message(served):
    result = served.moerge("route", "x", "--url", "not a url")
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert "not a url" in result.stderr
