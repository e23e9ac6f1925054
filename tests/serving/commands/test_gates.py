"""`moerge gates`: training writes to the registry, calibrating asks the server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from adapters_registry.registry import Registry
from serving.commands import gates

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*words: str) -> Result:
    return CliRunner().invoke(gates.app, list(words))


@pytest.fixture
def train(offline: Any) -> Any:
    return lambda *words: offline("gates", "train", *words, "--steps", "2", "--batch", "2")


def test_phatgoose_vectors_are_kept_with_the_version(train: Any, registry: Registry) -> None:
    result = train("uppercase", "--json")
    assert result.exit_code == 0, result.output
    (told,) = json.loads(result.stdout)["experts"]
    assert (told["name"], told["version"], told["samples"]) == ("uppercase", 1, 4)
    vectors = registry.tensors("uppercase", 1, "phatgoose")
    assert vectors is not None
    assert len(vectors) == told["modules"] == 16
    assert vectors["model.layers.0.self_attn.q_proj"].shape == (128,)
    assert registry.tensor_keys("vowels") == []


def test_meteora_vectors_are_trained_together(train: Any, registry: Registry) -> None:
    result = train("uppercase", "vowels", "--gate", "meteora")
    assert result.exit_code == 0, result.output
    assert "vowels version 1: 16 vectors" in result.stdout
    assert registry.tensor_keys("uppercase") == registry.tensor_keys("vowels") == ["meteora"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["nobody"], "No expert 'nobody'. Registered: json, uppercase, vowels."),
        (["uppercase", "--gate", "arrow"], "No trained gate 'arrow'. There are: phatgoose, meteora."),
        (["uppercase", "--gate", "meteora"], "name at least two"),
        (["uppercase", "json"], "samples that have answers there is nothing to train on: json"),
    ],
)
def test_mistakes_are_one_message_and_change_nothing(
    train: Any, registry: Registry, words: list[str], complaint: str
) -> None:
    result = train(*words)
    assert result.exit_code == 1
    assert complaint in result.stderr
    assert "Traceback" not in result.output
    assert registry.tensor_keys("uppercase") == []


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the server was asked; it answers that `a` was measured."""
    bodies: list[dict[str, Any]] = []

    def post(self: httpx.Client, url: str, json: Any) -> httpx.Response:
        assert url == "/v1/gates/calibrate"
        bodies.append(json)
        measured = [] if json["gate"] == "probe" else ["a"]
        return httpx.Response(200, json={"object": "calibration", "key": "statistics/x", "measured": measured})

    monkeypatch.setattr(httpx.Client, "post", post)
    return bodies


def test_calibrating_asks_the_server(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "neutral").write_text("one\n\ntwo\n")
    settings = '{"score": "arrow"}'
    result = run("calibrate", "a", "--again", "--settings", settings, "--prompts", str(tmp_path / "neutral"))
    assert result.exit_code == 0, result.output
    assert result.stdout == "statistics/x: measured a\n"
    assert asked == [
        {"gate": "evidence", "again": True, "settings": {"score": "arrow"}, "experts": ["a"], "prompts": ["one", "two"]}
    ]
    assert "nobody; all had been measured" in run("calibrate", "--gate", "probe").stdout.replace("\n", " ")
    assert json.loads(run("calibrate", "--json").stdout)["measured"] == ["a"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--settings", "{"], "--settings is not JSON"),
        (["--prompts", "/nowhere/at/all"], "No such file"),
        (["--prompts", "/dev/null"], "holds no prompts"),
    ],
)
def test_what_cannot_be_asked_is_told(asked: list[dict[str, Any]], words: list[str], complaint: str) -> None:
    result = run("calibrate", *words)
    assert result.exit_code == 1
    assert complaint in result.stderr
    assert asked == []
