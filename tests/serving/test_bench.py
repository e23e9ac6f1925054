"""`moerge bench serve` without its server: what a blend adds to a request, and how it is shown."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest
from typer.testing import CliRunner

from serving import bench
from serving.bench import BLENDS, blend_times
from serving.cli import app


def test_every_kind_is_asked_in_turn_and_every_cold_blend_is_new() -> None:
    asked: list[tuple[str, Any]] = []

    async def ask(prompt: str, model: str, max_tokens: int, moerge: dict[str, Any] | None = None) -> None:
        assert max_tokens == 1
        asked.append((model, moerge))

    prompts = (f"prompt {n}" for n in itertools.count())
    found = asyncio.run(blend_times(ask, ["a", "b", "c"], prompts, lambda text: None))
    assert len(asked) == 4 * (BLENDS + 1)
    cold, warm, composite = asked[1::4], asked[2::4], asked[3::4]
    assert cold == warm
    assert len({json.dumps(extension) for _, extension in cold}) == BLENDS + 1
    assert all(extension["operator"] == "cat" for _, extension in cold)
    assert all(sum(extension["experts"].values()) == pytest.approx(1) for _, extension in cold)
    assert all("operator" not in extension for _, extension in composite)
    assert found["added_ms"].keys() == {"cold", "warm", "composite"}
    assert {f"{kind}_ms" for kind in ("single", *found["added_ms"])} < found.keys()


def test_a_single_expert_cannot_be_blended() -> None:
    assert asyncio.run(blend_times(None, ["a"], iter(()), lambda text: None)) == {}


def test_the_command_shows_what_a_blend_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    took = {"p50": 30.0, "p95": 45.0}
    result = {
        "throughput": [],
        "route_ms": took,
        "register_to_answer_s": 1.0,
        "startup_s": 9.0,
        "blend": {
            **{f"{kind}_ms": took for kind in ("single", "cold", "warm", "composite")},
            "added_ms": {"cold": 40.0, "warm": -0.5, "composite": 2.0},
        },
    }
    monkeypatch.setattr(bench, "bench_served", lambda *arguments: result)
    shown = CliRunner().invoke(app, ["bench", "serve"])
    assert shown.exit_code == 0, shown.output
    text = " ".join(shown.output.split())
    assert "built and loaded for the request: p50 30.0 ms (+40.0), p95 45.0 ms" in text
    assert "the same blend again: p50 30.0 ms (-0.5)" in text
