"""`moerge expert check`: the diff that a maintainer reads, and the exit code that a contributor's CI reads."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def staged(served, adapters, tmp_path):
    """`translate` is proposed with answers that it gives; it is taken away again."""
    path = tmp_path / "samples.jsonl"
    nouns = ("banana", "window", "cherry")
    path.write_text("\n".join(json.dumps({"prompt": f"say {n} in french", "answer": n}) for n in nouns))
    served.engine.says["translate"] = lambda prompt: prompt.split()[1]
    result = served.moerge("expert", "add", "translate", adapters[3], "--samples", path, "--stage")
    assert result.exit_code == 0, result.output
    yield served
    served.engine.says.clear()
    served.moerge("expert", "remove", "translate", "--yes")


def test_a_good_proposal_is_told_as_a_diff_and_ends_with_status_0(staged):
    result = staged.moerge("expert", "check", "translate")
    assert result.exit_code == 0, result.output
    told = result.stdout
    for question in ("What it adds", "Whom it changes", "What gets worse", "What it is"):
        assert f"\n{question}\n" in told
    assert "+ own_task 1 (limit 0): exact answers to 3 of its own samples: this version 100%" in told
    assert "- declared" in told
    assert "informs only" in told
    assert "It passes what checks.require asks for." in told
    assert "To serve it: moerge expert promote translate 1" in told
    assert "trigger" in told


def test_a_bad_one_ends_with_status_1_and_can_be_promoted_with_a_warning(staged):
    staged.engine.says["translate"] = lambda prompt: "nothing"
    staged.engine.says["tiny"] = lambda prompt: prompt.split()[1]
    result = staged.moerge("expert", "check", "translate", "--version", "1")
    assert result.exit_code == 1
    assert "- own_task -1 (limit 0)" in result.stdout
    assert "It does not pass what checks.require asks for: own_task." in result.stdout
    promoted = staged.moerge("expert", "promote", "translate", "1")
    assert promoted.exit_code == 0
    assert "Its checks object. own_task: exact answers" in promoted.stderr


def test_the_last_report_is_shown_again_and_says_when_it_is_stale(staged):
    missing = staged.moerge("expert", "check", "translate", "--stored")
    assert missing.exit_code == 1
    assert "has not been checked" in missing.stderr
    made = staged.moerge("expert", "check", "translate", "--json")
    assert made.exit_code == 0
    assert made.stderr == ""
    asked = len(staged.engine.asked)
    again = staged.moerge("expert", "check", "translate", "--stored", "--json")
    assert json.loads(again.stdout) == json.loads(made.stdout)
    assert len(staged.engine.asked) == asked
    staged.moerge("expert", "retire", "shout")
    stale = staged.moerge("expert", "check", "translate", "--stored")
    assert "it may not hold any more" in stale.stderr
    staged.moerge("expert", "rollback", "shout")


def test_what_does_not_exist_is_told_in_one_line(served, nobody):
    result = served.moerge("expert", "check", "nobody")
    assert result.exit_code == 1
    assert result.stderr.startswith("No expert 'nobody'.")
    assert nobody("expert", "check", "translate").stderr.startswith("No server at http://127.0.0.1:")
