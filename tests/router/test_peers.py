from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import median_abs_deviation

from router.peers import FARTHEST, FEW, robust_z

figures = st.lists(st.floats(-1e6, 1e6), min_size=FEW, max_size=30)


@given(figures, st.floats(-1e6, 1e6))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_it_is_scipy_s_median_and_deviation(peers: list[float], value: float) -> None:
    spread = float(median_abs_deviation(peers, scale="normal"))
    assume(spread > 1e-9)
    expected = float(np.clip((value - np.median(peers)) / spread, -FARTHEST, FARTHEST))
    assert robust_z(value, peers) == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_odd_peers_do_not_hide_an_odd_newcomer() -> None:
    usual = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0]
    alone, beside = robust_z(10.0, usual), robust_z(10.0, [*usual, 100.0, 200.0])
    assert alone is not None
    assert alone > 50
    assert beside is not None
    assert beside > 40


def test_below_five_peers_nothing_is_said() -> None:
    assert robust_z(3.0, [1.0] * (FEW - 1)) is None
    assert robust_z(3.0, [1.0] * (FEW - 1) + [math.nan, math.inf]) is None
    assert robust_z(3.0, [1.0] * FEW) is not None


def test_peers_that_are_all_the_same() -> None:
    same = [1.0] * FEW
    assert [robust_z(value, same) for value in (0.5, 1.0, 1.5)] == [-FARTHEST, 0.0, FARTHEST]
    assert robust_z(1.5, same, least=0.25) == 2.0


def test_values_that_are_no_numbers() -> None:
    peers = [0.0, 1.0, 2.0, 3.0, 4.0]
    assert [robust_z(value, peers) for value in (math.nan, math.inf, -math.inf)] == [FARTHEST, FARTHEST, -FARTHEST]
