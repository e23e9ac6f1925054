from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from router.mixture import MixtureSettings, mixture_weights, on_grid

shares = st.lists(st.floats(0.001, 1), min_size=1, max_size=12).map(lambda w: np.array(w) / sum(w))


@given(shares, st.sampled_from([0.5, 0.1, 0.05, 0.01]))
def test_rounded_weights_add_up_to_one_and_move_less_than_the_grid(weights: np.ndarray, grid: float) -> None:
    rounded = on_grid(weights, grid)
    assert rounded.sum() == pytest.approx(1)
    np.testing.assert_array_less(np.abs(rounded - weights), grid + 1e-9)
    np.testing.assert_allclose(rounded / grid, np.round(rounded / grid), atol=1e-6)


def test_softmax_weights_are_lorauters() -> None:
    settings = MixtureSettings(top_k=3, grid=0.01)
    scores = np.array([0.9, 0.7, 0.5])
    expected = np.exp(scores / 0.2) / np.exp(scores / 0.2).sum()
    np.testing.assert_allclose(mixture_weights(scores, settings), expected, atol=0.01)


def test_uniform_weights_stay_exactly_equal() -> None:
    np.testing.assert_array_equal(
        mixture_weights(np.array([0.9, 0.1, 0.0]), MixtureSettings(top_k=3, weights="uniform")), np.full(3, 1 / 3)
    )


def test_the_best_expert_is_never_rounded_away() -> None:
    assert mixture_weights(np.zeros(64), MixtureSettings(top_k=64, grid=0.5))[0] > 0


def test_an_unknown_operator_is_refused_when_it_would_be_used() -> None:
    with pytest.raises(ValidationError, match="No operator 'nope'"):
        MixtureSettings(top_k=2, operator="nope")
