"""`moerge expert`: registering on a running server and looking after what is there."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def samples(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text(
        '{"prompt": "say banana in french", "answer": "banane"}\nsay window in french\n\n"say tree in french"\n'
    )
    return path


@pytest.fixture
def expert(served, adapters, samples):
    """The expert `translate`, registered by upload, and removed again."""
    result = served.moerge("expert", "add", "translate", adapters[3], "--samples", samples, "--tag", "a", "--tag", "b")
    assert result.exit_code == 0, result.output
    yield result
    served.moerge("expert", "remove", "translate", "--yes")


def test_a_folder_is_uploaded_and_answers_the_next_question(served, expert):
    assert "changes next-token log-probabilities by up to 0.25 nats" in expert.stderr
    assert "translate version 1 is active." in expert.stderr
    answer = served.moerge("chat", "say cherry in french")
    assert answer.stdout == "translate say cherry in french \n"
    assert "translate=1" in answer.stderr


def test_what_was_registered_is_shown(served, expert):
    shown = json.loads(served.moerge("expert", "show", "translate", "--json").stdout)
    assert shown["tags"] == ["a", "b"]
    assert [each["prompt"] for each in shown["sample_prompts"]] == [
        "say banana in french",
        "say window in french",
        "say tree in french",
    ]
    assert shown["sample_prompts"][0]["answer"] == "banane"
    assert [each["version"] for each in shown["versions"]] == [1]
    table = served.moerge("expert", "show", "translate").stdout
    assert "say banana in french" in table
    assert "1 (active)" in table


def test_experts_are_listed(served, expert):
    result = served.moerge("expert", "list")
    for name in ("count", "reverse", "shout", "translate"):
        assert name in result.stdout
    names = [each["name"] for each in json.loads(served.moerge("expert", "list", "--json").stdout)]
    assert names == ["count", "reverse", "shout", "translate"]
    assert json.loads(served.moerge("expert", "list", "--json", "--state", "staged").stdout) == []
    assert served.moerge("expert", "list", "--state", "asleep").exit_code == 1


def test_an_expert_is_retired_rolled_back_and_promoted(served, expert):
    for command, state in (
        (("retire", "translate"), "retired"),
        (("rollback", "translate"), "active"),
        (("retire", "translate"), "retired"),
        (("promote", "translate", "1"), "active"),
    ):
        result = served.moerge("expert", *command)
        assert result.exit_code == 0
        assert f"translate version 1 is {state}." in result.stderr


def test_one_without_an_active_version_can_still_be_shown(served, expert):
    served.moerge("expert", "retire", "translate")
    assert json.loads(served.moerge("expert", "show", "translate", "--json").stdout)["state"] == "retired"


def test_removing_asks_first(served, expert):
    refused = served.moerge("expert", "remove", "translate", input="n\n")
    assert refused.exit_code == 1
    assert served.moerge("expert", "show", "translate").exit_code == 0
    done = served.moerge("expert", "remove", "translate", input="y\n")
    assert done.exit_code == 0
    assert "translate with all its versions is removed." in done.stderr
    assert served.moerge("expert", "show", "translate").exit_code == 1


def test_a_refusal_lists_every_reason(served, adapters):
    result = served.moerge("expert", "add", "reverse", adapters[1])
    assert result.exit_code == 1
    assert "already taken" in result.stderr
    assert "registered already" in result.stderr
    assert "Traceback" not in result.output


def test_a_quarantined_expert_is_told_with_the_figure_and_ends_with_status_1(served, adapters):
    served.engine.inert.add("translate")
    try:
        result = served.moerge("expert", "add", "translate", adapters[3])
        assert result.exit_code == 1
        assert "by up to 0 nats" in result.stderr
        assert "translate version 1 is quarantined." in result.stderr
        refused = served.moerge("expert", "promote", "translate", "1")
        assert refused.exit_code == 1
        assert "quarantined" in refused.stderr
        assert served.moerge("expert", "promote", "translate", "1", "--force").exit_code == 0
    finally:
        served.engine.inert.clear()
        served.moerge("expert", "remove", "translate", "--yes")


def test_a_hub_repository_is_named_with_its_revision_and_folder(served, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = served.moerge("expert", "add", "x", "hub:org/name@v1#inside")
    assert result.exit_code == 1
    assert "'org/name'" in result.stderr
    assert "HF_HUB_OFFLINE" in result.stderr


def test_a_folder_without_an_adapter_is_not_even_sent(served, tmp_path):
    result = served.moerge("expert", "add", "x", tmp_path)
    assert result.exit_code == 1
    assert "is not a PEFT folder" in result.stderr


@pytest.mark.parametrize(("content", "says"), [(b"{nope\n", ":1: not JSON"), (b"\xff\xfe", "utf-8"), (None, "No such")])
def test_samples_that_cannot_be_read_are_named(served, adapters, tmp_path, content, says):
    path = tmp_path / "samples"
    if content is not None:
        path.write_bytes(content)
    result = served.moerge("expert", "add", "x", adapters[3], "--samples", path)
    assert result.exit_code == 1
    assert str(path) in result.stderr
    assert says in result.stderr


def test_json_output_is_nothing_but_json(served, adapters, samples):
    result = served.moerge("expert", "add", "translate", adapters[3], "--samples", samples, "--json", "--stage")
    try:
        assert json.loads(result.stdout)["state"] == "staged"
        assert result.stderr == ""
    finally:
        served.moerge("expert", "remove", "translate", "--yes")


@pytest.mark.parametrize(
    "words",
    [
        ("expert", "list"),
        ("expert", "show", "x"),
        ("expert", "promote", "x", "1"),
        ("expert", "rollback", "x"),
        ("expert", "retire", "x"),
        ("expert", "remove", "x", "-y"),
        ("expert", "add", "x", "hub:a/b"),
        ("route", "hello"),
        ("chat", "hello"),
    ],
)
def test_without_a_server_there_is_one_clear_line(nobody, words):
    result = nobody(*words)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("No server at http://127.0.0.1:")
    assert "moerge serve" in result.stderr
    assert result.stderr.count("\n") == 1
