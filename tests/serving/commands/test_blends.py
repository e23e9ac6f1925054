"""`moerge blend`: storing blends on a running server and looking after them."""

from __future__ import annotations

import json

import pytest

BOTH = ("--member", "count=0.6", "-m", "shout=0.4")


@pytest.fixture
def blend(served):
    """The blend `both`, removed again."""
    result = served.moerge("blend", "create", "both", *BOTH, "--description", "Two together.")
    assert result.exit_code == 0, result.output
    yield result
    served.moerge("blend", "remove", "both", "--yes")


def test_a_blend_is_stored_and_answers_the_next_question(served, blend):
    assert "both is stored: cat of count=0.6, shout=0.4; blend:" in blend.stderr
    assert "rank 8, nothing cut off." in blend.stderr
    answer = served.moerge("chat", "anything", "--model", "both")
    assert answer.exit_code == 0
    assert answer.stdout.startswith("blend:")
    assert "count=0.6,shout=0.4" in answer.stderr


def test_blends_are_listed(served, blend):
    result = served.moerge("blend", "list")
    assert "both" in result.stdout
    [listed] = json.loads(served.moerge("blend", "list", "--json").stdout)
    assert (listed["name"], listed["usable"], listed["report"]["rank"]) == ("both", True, 8)


def test_one_is_shown_by_name_and_by_content(served, blend):
    shown = json.loads(served.moerge("blend", "show", "both", "--json").stdout)
    assert [each["weight"] for each in shown["members"]] == [0.6, 0.4]
    assert json.loads(served.moerge("blend", "show", shown["id"], "--json").stdout) == shown
    table = served.moerge("blend", "show", "both").stdout
    for text in ("count version 1: 0.6", "Apache-2.0", "Two together.", shown["id"], '"rank": 8'):
        assert text in table


def test_operators_have_settings(served):
    words = ("--operator", "ties", "--set", "density=0.3", "--set", "mean=count")
    result = served.moerge("blend", "create", *BOTH, *words, "--json")
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert (made["name"], made["settings"]) == (None, {"density": 0.3, "mean": "count"})
    assert made["id"] in served.moerge("blend", "list").stdout
    assert served.moerge("blend", "remove", made["id"], "--yes").exit_code == 0


def test_a_blend_of_blends_says_what_it_was_made_of(served, blend):
    result = served.moerge("blend", "create", "more", "-m", "both=0.5", "-m", "reverse=1", "--private")
    assert result.exit_code == 0, result.output
    table = served.moerge("blend", "show", "more").stdout
    for text in ("count version 1: 0.3", "both: 0.5", "private"):
        assert text in table
    served.moerge("blend", "remove", "more", "--yes")


def test_the_server_s_reasons_are_told(served, blend):
    result = served.moerge("blend", "create", "count", "-m", "nobody=1", "-m", "count=1", "--operator", "magic")
    assert result.exit_code == 1
    for text in ("taken, by an expert", "No expert 'nobody'", "No operator 'magic'"):
        assert text in result.stderr
    assert "pass replace" in served.moerge("blend", "create", "both", *BOTH).stderr
    assert served.moerge("blend", "create", "both", "-m", "count", "-m", "shout", "--replace").exit_code == 0
    for command in ("show", "remove"):
        result = served.moerge("blend", command, "../../x y", *(["--yes"] if command == "remove" else []))
        assert result.exit_code == 1
        assert "Not Found" in result.stderr
    assert "No blend 'nothing'. Stored: both." in served.moerge("blend", "show", "nothing").stderr


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "Name its members"),
        (("-m", "count=much"), "'much' is no weight"),
        (("-m", "count=nan"), "'nan' is no weight"),
        (("-m", "count=0.5", "-m", "shout"), "Give every member a weight"),
        ((*BOTH, "--set", "density"), "--set density=0.3"),
        ((*BOTH, "--set", "=3"), "--set density=0.3"),
    ],
)
def test_what_cannot_be_understood_is_not_sent(nobody, words, text):
    result = nobody("blend", "create", "x", *words)
    assert result.exit_code == 1
    assert text in result.stderr


def test_licences_that_restrict_are_told(served, adapters):
    words = ("--licence", "cc-by-nc-4.0")
    assert served.moerge("expert", "add", "free", adapters[3], *words).exit_code == 0
    result = served.moerge("blend", "create", "licensed", "-m", "count", "-m", "free")
    assert "free: licence cc-by-nc-4.0 (non-commercial)" in result.stderr
    served.moerge("expert", "retire", "free")
    result = served.moerge("blend", "show", "licensed")
    assert "is retired" in result.stdout
    assert "no" in served.moerge("blend", "list").stdout
    served.moerge("blend", "remove", "licensed", "--yes")
    served.moerge("expert", "remove", "free", "--yes")


def test_one_is_made_anew_of_the_versions_that_are_active(served, adapters):
    assert served.moerge("expert", "add", "grows", adapters[3]).exit_code == 0
    words = ("-m", "grows=0.7", "-m", "count=0.3", "--operator", "ties", "--set", "density=0.5", "--private")
    old = json.loads(served.moerge("blend", "create", "fresh", *words, "--json").stdout)
    served.moerge("expert", "remove", "grows", "--yes")
    assert "No expert 'grows'" in served.moerge("blend", "renew", "fresh").stderr
    assert served.moerge("expert", "add", "grows", adapters[3]).exit_code == 0
    assert "fresh is stored: ties of grows=0.7, count=0.3" in served.moerge("blend", "renew", "fresh").stderr
    new = json.loads(served.moerge("blend", "show", "fresh", "--json").stdout)
    changed = {key for key in old if old[key] != new[key]}
    assert changed <= {"created_at", "loaded"}, "the same content, so the same blend"
    assert served.moerge("blend", "renew", "nothing").exit_code == 1
    served.moerge("blend", "remove", "fresh", "--yes")
    served.moerge("expert", "remove", "grows", "--yes")


def test_removing_asks_first(served, blend):
    refused = served.moerge("blend", "remove", "both", input="n\n")
    assert refused.exit_code == 1
    assert served.moerge("blend", "show", "both").exit_code == 0
    removed = served.moerge("blend", "remove", "both", input="y\n")
    assert "both is removed." in removed.stderr
    assert served.moerge("blend", "show", "both").exit_code == 1
