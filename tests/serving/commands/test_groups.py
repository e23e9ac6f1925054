"""`moerge groups build` and `show`."""

from __future__ import annotations

import json


def test_groups_are_shown_and_built(served):
    assert "There are no groups" in served.moerge("groups", "show").stdout
    built = served.moerge("groups", "build", "--gate", "constant", "--gate", "arrow")
    assert built.exit_code == 0, built.output
    for part in ("count, reverse, shout", "12", "constant, arrow", "by weights"):
        assert part in built.stdout
    body = json.loads(served.moerge("groups", "show", "--json").stdout)
    assert body["data"][0]["experts"] == ["count", "reverse", "shout"]
    again = json.loads(served.moerge("groups", "build", "--by", "prototypes", "--json").stdout)
    assert again["by"] == "prototypes"


def test_a_refusal_is_one_message(served):
    result = served.moerge("groups", "build", "--gate", "nonsense")
    assert result.exit_code == 1
    assert "No gate nonsense" in result.stderr
