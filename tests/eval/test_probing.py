"""Readings of the base model, against the probe itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eval import probing
from eval.arena import DATA, Arena
from eval.calibration import calibrate
from eval.probing import PLAIN, WAYS, Readings
from eval.testbed.manifest import read_jsonl
from tests.eval.conftest import NAMES, PROMPTS, SAMPLES

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def readings(monkeypatch: pytest.MonkeyPatch) -> Readings:
    def few(path: Path) -> list[dict[str, Any]]:
        return read_jsonl(path)[:3]

    monkeypatch.setattr(probing, "read_jsonl", few)
    monkeypatch.setattr(probing, "LINES", 3)
    folders = {name: DATA / "experts" / name for name in NAMES}
    return Readings(Arena(DATA, NAMES, PROMPTS[:3], SAMPLES, folders, np.eye(3)))


def test_evidence_is_the_probes(readings: Readings) -> None:
    arena = readings.arena
    owners, texts = zip(*SAMPLES, strict=True)
    for settings in ({"score": "spectr"}, {"score": "arrow"}, {"score": "spectr", "centred": True}):
        kept = calibrate(arena.model, arena.folders, [arena.ids(text) for text in texts], owners, **settings)
        for name, tensors in kept.items():
            arena.kept[name].update(tensors)
        arena = replace(arena, kept=arena.kept)  # composites afresh
        expected = arena.evidence(settings, [NAMES] * 3)
        way = replace(PLAIN, score=str(settings["score"]), centred="centred" in settings)
        torch.testing.assert_close(readings.evidence(way), expected, rtol=1e-3, atol=0.05)


def test_every_way_gives_every_expert_a_number(readings: Readings) -> None:
    for way in WAYS.values():
        evidence = readings.evidence(way)
        assert evidence.shape == (3, 3)
        assert evidence.isfinite().all()
        everyone, told, _, listed = readings.accuracy(evidence)
        assert 0 <= everyone == told == listed <= 1, "three experts, all instruction-told, are their own shortlist"


def test_without_evidence_the_prior_decides(readings: Readings) -> None:
    *accuracy, loss = readings.with_prior(torch.zeros(3, 3), 0.003)
    assert accuracy[0] == accuracy[1] == accuracy[3] == 1
    assert loss == pytest.approx(float(np.log(1 + 2 * np.exp(-1 / 0.2))), rel=1e-4)
    assert readings.with_prior(1 - torch.eye(3), 100)[0] == 0
