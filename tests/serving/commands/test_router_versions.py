"""`moerge router train|list|show|promote|rollback`: on the registry's files, with the real encoder."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from adapters_registry.feedback import Decided
from adapters_registry.registry import Registry
from router.versions import RouterVersions

pytestmark = pytest.mark.usefixtures("one_thread")


def answered(name: str, expert: str, text: str) -> Decided:
    return Decided(
        id=name,
        at=datetime.now(UTC),
        tenant=None,
        method="retrieval",
        kind="select",
        experts=[{"expert": expert, "id": f"{expert}@1", "weight": 1.0}],
        candidates=[],
        confidence=0.5,
        router=0,
        encoder="another",
        vector=np.zeros(0, np.float32),
        text=text,
    )


@pytest.fixture
def versions(registry: Registry) -> RouterVersions:
    return RouterVersions(registry.store.root.with_name("routers"))


def test_without_feedback_there_is_nothing_to_learn(offline: Any, versions: RouterVersions) -> None:
    result = offline("router", "train")
    assert result.exit_code == 0, result.output
    assert "no feedback that the version in force does not know" in " ".join(result.stdout.split())
    assert versions.numbers() == []


def test_a_version_is_written_and_promoted_only_if_it_is_better(
    offline: Any, registry: Registry, versions: RouterVersions
) -> None:
    texts = [f"Write the word {word} in capital letters, upside down" for word in ("cat", "dog", "sun", "map", "car")]
    decisions = [answered(f"dec-{k}", "uppercase", text) for k, text in enumerate(texts)]
    registry.decisions.add([*decisions, answered("dec-gone", "nobody", "Who is it?")])
    for each in (*(decision.id for decision in decisions), "dec-gone"):
        registry.decisions.rate(each, 0.0)
    told = json.loads(offline("router", "train", "--json").stdout)
    assert (told["version"], told["promoted"]) == (1, False)
    assert (told["report"]["good"], told["report"]["bad"]) == (0, 5)
    assert told["report"]["why"] == "5 new judgements say too little; 10 are needed"
    assert told["report"]["samples"]["prompts"] == 8
    assert versions.active().learned.number == 0
    assert [rating.text for rating in versions.load(1).content.ratings] == texts

    for k, text in enumerate(texts):
        registry.decisions.add([answered(f"more-{k}", "uppercase", f"{text}, please")])
        registry.decisions.rate(f"more-{k}", 0.0)
    result = offline("router", "train")
    assert result.exit_code == 0, result.output
    kept = (
        "Router version 2 is in force." if versions.active().learned.number == 2 else "Router version 2 is kept aside"
    )
    assert kept in " ".join(result.stdout.split())
    assert "samples" in result.stdout


def test_versions_are_listed_shown_promoted_and_rolled_back(offline: Any, versions: RouterVersions) -> None:
    versions.save(note="first")
    versions.save(note="second", calibration={"retrieval": {"temperature": 0.1}})
    assert "version 0" in offline("router", "show").stdout.lower()
    assert offline("router", "promote", "2").stdout.strip() == "Version 2 is in force."
    listed = json.loads(offline("router", "list", "--json").stdout)
    assert listed["active"] == 2
    assert [(each["number"], each["active"], each["note"]) for each in listed["versions"]] == [
        (1, False, "first"),
        (2, True, "second"),
    ]
    assert listed["versions"][1]["calibrated"] == ["retrieval"]
    assert json.loads(offline("router", "show", "1", "--json").stdout)["note"] == "first"
    assert "Calibrated: retrieval." in offline("router", "show").stdout
    assert "registry alone" in offline("router", "rollback").stdout
    refused = offline("router", "rollback")
    assert refused.exit_code == 1
    assert "No router version was in force before" in refused.stderr


def test_a_damaged_version_is_shown_as_such_and_not_promoted(offline: Any, versions: RouterVersions) -> None:
    for _ in range(2):
        versions.promote(versions.save().number)
    (versions.folder / "2.json").write_text("{}")
    result = offline("router", "list")
    assert "Version 1 is used instead." in " ".join(result.stderr.split())
    assert json.loads(offline("router", "list", "--json").stdout)["versions"][1]["problem"].startswith(
        "The router file 2.json"
    )
    for number, complaint in (("2", "cannot be used"), ("9", "No router version 9. There are: 1, 2")):
        refused = offline("router", "promote", number)
        assert refused.exit_code == 1
        assert complaint in " ".join(refused.stderr.split())
        assert "Traceback" not in refused.output


def test_a_method_that_is_not_served_is_named(offline: Any) -> None:
    result = offline("router", "train", "--method", "palmistry")
    assert result.exit_code == 1
    assert "No routing method 'palmistry'. Served: fusion" in " ".join(result.stderr.split())
