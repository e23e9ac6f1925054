from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from router.calibration import Calibration
from router.conformal import softmax
from router.decision import Decision
from router.library import Library, build
from router.method import Query, calibrated, decide
from router.methods import METHODS
from router.methods.retrieval import TEMPERATURES, Retrieval, RetrievalSettings
from router.mixture import SPREAD, MixtureSettings, mixture_weights, on_grid

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
    np.testing.assert_allclose(mixture_weights(scores, settings, 0.2), expected, atol=0.01)
    assert SPREAD * TEMPERATURES["centroid"] == pytest.approx(0.2)


def test_weights_do_not_depend_on_the_units_of_the_scores() -> None:
    scores, settings = np.array([0.9, 0.7, 0.5]), MixtureSettings(top_k=3)
    weights = mixture_weights(scores, settings, SPREAD * 0.04)
    np.testing.assert_array_equal(mixture_weights(25 * scores, settings, SPREAD * 1.0), weights)


def test_uniform_weights_stay_exactly_equal() -> None:
    np.testing.assert_array_equal(
        mixture_weights(np.array([0.9, 0.1, 0.0]), MixtureSettings(top_k=3, weights="uniform"), 0.2), np.full(3, 1 / 3)
    )


def test_the_best_expert_is_never_rounded_away() -> None:
    assert mixture_weights(np.zeros(64), MixtureSettings(top_k=64, grid=0.5), 0.2)[0] > 0


def test_an_unknown_operator_is_refused_when_it_would_be_used() -> None:
    with pytest.raises(ValidationError, match="No operator 'nope'"):
        MixtureSettings(top_k=2, operator="nope")


def mixture(make_expert: Callable[..., Any], cosines: dict[str, float], **settings: Any) -> Decision:
    """What retrieval decides of a prompt that has these cosines with experts of one sample each, `a=x`: of digest x."""
    experts, vectors = [], {}
    for name, cosine in cosines.items():
        called, _, digest = name.partition("=")
        experts.append(make_expert(called, "a sample", **({"digest": digest.ljust(64, "0")} if digest else {})))
        vectors[experts[-1].id] = np.array([[cosine, np.sqrt(1 - cosine**2)]], np.float32)
    library: Library = build(experts, lambda texts: np.zeros((0, 2), np.float32), 2, stored=vectors)
    method = Retrieval.fit(library, RetrievalSettings(**settings))
    query = Query("text", np.array([1, 0], np.float32), np.ones(len(library), bool))
    return decide("retrieval", method, library, query)


def test_the_best_experts_answer_together(make_expert: Callable[..., Any]) -> None:
    decision = mixture(make_expert, {"a": 0.5, "b": 0.9, "c": 0.7, "d": 0.6}, top_k=3, operator="ties")
    assert (decision.kind, decision.operator) == ("blend", "ties")
    assert decision.summary == "b=0.6,c=0.25,d=0.15"
    assert mixture(make_expert, {"a": 0.5, "b": 0.9}).kind == "select"


def test_prompts_that_are_nearly_alike_get_the_same_blend(make_expert: Callable[..., Any]) -> None:
    near = [mixture(make_expert, {"a": 0.801 + shift, "b": 0.6}, top_k=2) for shift in (0.0, 0.001, 0.002)]
    assert len({decision.experts for decision in near}) == 1


def test_an_expert_under_its_own_threshold_does_not_join(make_expert: Callable[..., Any]) -> None:
    cosines = {"a": 0.8, "b": 0.75, "c": 0.1}
    assert {each.expert for each in mixture(make_expert, cosines, top_k=3).experts} == {"a", "b"}
    all_of_them = mixture(make_expert, cosines, top_k=3, threshold=-1, weights="uniform").experts
    assert {each.expert for each in all_of_them} == {"a", "b", "c"}
    assert mixture(make_expert, {"a": 0.8, "c": 0.1}, top_k=3).kind == "select"


def test_the_same_adapter_under_several_names_has_one_place(make_expert: Callable[..., Any]) -> None:
    decision = mixture(make_expert, {"a=x": 0.8, "b=x": 0.8, "c=y": 0.8, "d": 0.7}, top_k=3, weights="uniform")
    assert [each.expert for each in decision.experts] == ["a", "c", "d"]
    assert [each.expert for each in decision.candidates] == ["a", "b", "c", "d"]


def test_gates_have_no_mixture_s_settings() -> None:
    shared = set(MixtureSettings.model_fields) & set(METHODS["arrow"].Settings.model_fields)
    assert shared == {"alpha"}  # which says how many experts are worth a look, whatever becomes of them


@pytest.mark.parametrize(("alpha", "together"), [(None, 3), (0.5, 1), (0.2, 2), (0.01, 3)])
def test_a_calibrated_alpha_says_how_many_answer(
    make_expert: Callable[..., Any], alpha: float | None, together: int
) -> None:
    """Of ten held-out prompts, the right expert was the best for six, the second for three, the third for one."""
    vectors = {
        (expert := make_expert(name, "a sample")).id: (expert, np.array([[cosine, np.sqrt(1 - cosine**2)]], np.float32))
        for name, cosine in {"a": 0.9, "b": 0.8, "c": 0.7}.items()
    }
    library = build(
        [expert for expert, _ in vectors.values()],
        lambda texts: np.zeros((0, 2), np.float32),
        2,
        stored={key: rows for key, (_, rows) in vectors.items()},
    )
    settings = RetrievalSettings(top_k=3, threshold=-1, alpha=alpha, weights="uniform")
    query = Query("text", np.array([1, 0], np.float32), np.ones(3, bool))
    plain = Retrieval.fit(library, settings)
    assert len(decide("retrieval", plain, library, query).experts) == 3  # nothing is known yet
    p = softmax(np.array([0.9, 0.8, 0.7]), 0.1)
    kept = Calibration(
        settings=settings.model_dump_json(),
        temperature=0.1,
        nonconformity=tuple(np.repeat(1 - p, [6, 3, 1]).tolist()),
    )
    method = calibrated(plain, kept.model_dump(mode="json"), settings, "")
    assert len(decide("retrieval", method, library, query).experts) == together
