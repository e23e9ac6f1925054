"""`moerge router calibrate`: measures on the registry's samples and keeps the result as a router version."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import Result

from adapters_registry.registry import Registry
from router.router import Router, RouterSettings
from router.versions import Rating, RouterVersions

pytestmark = pytest.mark.usefixtures("one_thread")

DEFAULT = RouterSettings().method


@pytest.fixture
def versions(registry: Registry) -> RouterVersions:
    return RouterVersions(registry.store.root.with_name("routers"))


@pytest.fixture
def calibrate(offline: Callable[..., Result]) -> Callable[..., Result]:
    return lambda *words: offline("router", "calibrate", *words)


def test_what_was_measured_is_in_force_and_served(
    calibrate: Callable[..., Result], registry: Registry, versions: RouterVersions
) -> None:
    result = calibrate("--far", "0.2", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["version"], told["promoted"]) == (1, True)
    measured = told["methods"]["fusion"]
    assert measured["prompts"] == 8  # two experts have four samples each
    assert measured["outside"] >= 32  # with so few experts, neutral prompts stand in
    learned = versions.active().learned
    assert learned.number == 1
    assert learned.content.report["calibration"]["fusion"] == measured

    from router.encoder import load_encoder

    router = Router(load_encoder(), RouterSettings())
    router.refresh(registry.experts())
    plain = router.standing("fusion")
    router.refresh(registry.experts(), learned=learned)
    changed = router.standing("fusion")
    shift = learned.calibration["fusion"]["shift"]
    for name, threshold in plain.thresholds.items():
        assert changed.thresholds[name] == pytest.approx(threshold + shift)
    assert changed.temperature == learned.calibration["fusion"]["temperature"]
    router.close()


def test_prompts_out_of_domain_may_be_given_and_a_version_kept_aside(
    calibrate: Callable[..., Result], versions: RouterVersions, tmp_path: Path
) -> None:
    file = tmp_path / "ood.jsonl"
    file.write_text('{"prompt": "Who won the match?"}\n"Is it raining?"\nHow tall is the tower?\n')
    result = calibrate("--ood", str(file), "--stage")
    assert result.exit_code == 0, result.output
    assert "Router version 1 is kept aside." in result.stdout
    assert versions.numbers() == [1]
    assert versions.active().learned.number == 0
    assert versions.load(1).content.report["calibration"]["fusion"]["outside"] == 3


def test_what_was_learned_before_is_kept(calibrate: Callable[..., Result], versions: RouterVersions) -> None:
    rating = Rating(decision="d", expert="uppercase", score=1, text="say it louder")
    before = versions.save(
        ratings=[rating], vectors=np.ones((1, 384), np.float32), encoder="x", calibration={"knn": {"temperature": 2}}
    )
    versions.promote(before.number)
    assert calibrate().exit_code == 0
    learned = versions.active().learned
    assert (learned.number, learned.content.parent) == (2, 1)
    assert learned.content.ratings == (rating,)
    assert learned.calibration["knn"] == {"temperature": 2}
    assert "fusion" in learned.calibration


@pytest.mark.parametrize(
    ("words", "file", "complaint"),
    [
        (["--method", "nothing"], None, "Not served: nothing. Served are fusion"),
        ([], "\n\n", "holds no prompts"),
        ([], '{"text": "x"}\n', "prompt 1 has no text"),
        (["--far", "2"], None, "less than or equal to 1"),
    ],
)
def test_mistakes_are_one_message_and_change_nothing(
    calibrate: Callable[..., Result],
    versions: RouterVersions,
    tmp_path: Path,
    words: list[str],
    file: str | None,
    complaint: str,
) -> None:
    more: list[Any] = []
    if file is not None:
        (tmp_path / "ood.txt").write_text(file)
        more = ["--ood", str(tmp_path / "ood.txt")]
    result = calibrate(*words, *more)
    assert result.exit_code != 0
    assert complaint in " ".join(result.output.split())
    assert versions.numbers() == []
