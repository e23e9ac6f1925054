from __future__ import annotations

import json
import math

import pytest
from typer.testing import CliRunner

from router.blending import OPERATORS
from serving import bench_blend as module
from serving.bench_blend import PEFT, Shape, bench_blend
from serving.cli import app

TINY = Shape(layers=4, d=24, inner=40, members=3, rank=2)


@pytest.mark.parametrize("dense_layers", [0, 1])
def test_every_operator_is_measured_beside_peft_s(dense_layers: int) -> None:
    told: list[str] = []
    result = bench_blend(TINY, dense_layers, rounds=1, peft=True, tell=told.append)
    for figures in ("seconds", "cpu_seconds", "measured", "module_seconds", "module_cpu_seconds"):
        assert result[figures].keys() == OPERATORS.keys()
    assert result["cpu_ratios"].keys() == result["ratios"].keys() == {f"{name}/peft" for name in PEFT}
    assert all(each > 0 and math.isfinite(each) for each in (*result["seconds"].values(), *result["ratios"].values()))
    assert [result["measured"][name] for name in ("cat", "ties", "regmean")] == [28, 7 if dense_layers else 1, 1]
    assert (result["modules"], result["scaled"]) == (28, False)
    compared = {name: (each["modules"], each["d"]) for name, each in result["compared"].items()}
    assert (compared["cat"], compared["svd"], compared["ties"]) == ((28, 24), (1, 24), (1, 12))
    assert len(told) == len(OPERATORS) + len(PEFT)


def test_peft_can_be_left_out() -> None:
    result = bench_blend(TINY, dense_layers=1, rounds=1, peft=False, tell=lambda text: None)
    assert result["ratios"] == {}


def test_the_shapes_are_those_of_a_7b_model() -> None:
    modules = Shape().modules()
    assert len(modules) == 224
    assert sum(d_out * d_in for d_out, d_in in modules.values()) == 6_476_005_376


def test_the_command_prints_a_table_or_json(monkeypatch: pytest.MonkeyPatch) -> None:
    result = bench_blend(TINY, dense_layers=0, rounds=1, peft=False, tell=lambda text: None)
    compared = {"ours": 0.5, "peft": 2.0, "modules": 1, "d": 24}
    result |= {"compared": {"svd": compared}, "ratios": {"svd/peft": 0.25}}
    asked: list[tuple[object, ...]] = []

    def run(*arguments: object) -> dict[str, object]:
        asked.append(arguments[:4])
        return result

    monkeypatch.setattr(module, "bench_blend", run)
    shown = CliRunner().invoke(app, ["bench", "blend", "--layers", "4"])
    assert shown.exit_code == 0, shown.output
    assert "of 28 modules; nothing is scaled up" in shown.output
    printed = CliRunner().invoke(app, ["bench", "blend", "--no-peft", "--json"])
    assert json.loads(printed.stdout)["ratios"] == {"svd/peft": 0.25}
    assert asked == [(Shape(layers=4), 0, 3, True), (Shape(), 0, 3, False)]
