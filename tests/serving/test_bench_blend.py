from __future__ import annotations

import math

from router.blending import OPERATORS
from serving.bench_blend import PEFT, Shape, bench_blend

TINY = Shape(layers=2, d=24, inner=40, members=3, rank=2)


def test_every_operator_is_measured_beside_peft_s() -> None:
    told: list[str] = []
    result = bench_blend(TINY, dense_layers=1, rounds=1, peft=True, tell=told.append)
    measurable = {name for name, operator in OPERATORS.items() if operator.statistic is None}
    assert result["seconds"].keys() == result["measured"].keys() == measurable
    assert result["cpu_seconds"].keys() == measurable
    assert result["cpu_ratios"].keys() == result["ratios"].keys() == {f"{name}/peft" for name in PEFT}
    assert all(each > 0 and math.isfinite(each) for each in (*result["seconds"].values(), *result["ratios"].values()))
    assert (result["measured"]["cat"], result["measured"]["ties"]) == (14, 7)
    assert (result["compared"]["cat"]["modules"], result["compared"]["svd"]["modules"]) == (14, 1)
    assert len(told) == len(measurable) + len(PEFT)


def test_peft_can_be_left_out() -> None:
    result = bench_blend(TINY, dense_layers=1, rounds=1, peft=False, tell=lambda text: None)
    assert result["ratios"] == {}


def test_the_shapes_are_those_of_a_7b_model() -> None:
    modules = Shape().modules()
    assert len(modules) == 224
    assert sum(d_out * d_in for d_out, d_in in modules.values()) == 6_476_005_376
