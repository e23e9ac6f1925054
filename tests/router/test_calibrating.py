"""Calibration on exchangeable prompts, where what it promises must come true, and on a library of words."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_registry.expert import Expert
from router.calibrating import (
    Report,
    calibrate,
    calibration_error,
    outcome,
    threshold_shift,
    weigh,
)
from router.calibration import Calibration, Curve
from router.held_out import FOLDS, HeldOut, farthest, hold_out, part, taken_away, without
from router.library import Library, build
from router.method import Query, calibrated, decide, fitted
from router.methods.random import Random
from router.methods.retrieval import Retrieval, RetrievalSettings

MakeExpert = Callable[..., Expert]
DIM, EXPERTS, SAMPLES, NOISE = 16, 12, 20, 0.5
SETTINGS = RetrievalSettings()


def directions(rng: np.random.Generator, centres: np.ndarray, each: int, noise: float) -> np.ndarray:
    """(n * each, DIM) unit rows around the centres."""
    rows = np.repeat(centres, each, axis=0) + noise * rng.standard_normal((len(centres) * each, DIM))
    scaled: np.ndarray = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return scaled


@pytest.fixture(scope="module")
def library(make_expert: MakeExpert) -> Library:
    """Twelve experts that overlap."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((EXPERTS, DIM))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    rows = directions(rng, centres, SAMPLES, NOISE).reshape(EXPERTS, SAMPLES, DIM)
    experts = [make_expert(f"e{k:02}", *(f"{k} {j}" for j in range(SAMPLES))) for k in range(EXPERTS)]
    stored = {expert.id: rows[k] for k, expert in enumerate(experts)}
    return build(experts, lambda texts: np.zeros((0, DIM), np.float32), DIM, stored=stored)


@pytest.fixture(scope="module")
def held(library: Library) -> HeldOut:
    return hold_out(Retrieval, SETTINGS, library)


# Holding out


def test_held_out_scores_are_those_of_a_router_that_never_saw_the_prompt(library: Library, held: HeldOut) -> None:
    """The slow twin: for one sample, a library built anew without its fold."""
    fold, expert = 2, 5
    rows = [[j for j in range(SAMPLES) if j % FOLDS != fold] for _ in range(EXPERTS)]
    method = Retrieval.fit(part(library, rows), SETTINGS)
    mine = np.flatnonzero((held.part == fold) & (held.own == expert))
    assert len(mine) == SAMPLES // FOLDS
    for row, j in zip(mine, range(fold, SAMPLES, FOLDS), strict=True):
        asked = Query("", library.prototypes[expert][j], np.ones(EXPERTS, bool))
        np.testing.assert_array_equal(held.scores[row], method.score(asked))
        assert method.thresholds is not None
        assert held.limits[row] == method.thresholds[held.scores[row].argmax()]


def test_every_sample_is_held_out_once_and_regions_lend_prompts_of_nobody(library: Library, held: HeldOut) -> None:
    assert (held.own >= 0).sum() == EXPERTS * SAMPLES
    foreign = held.own < 0
    assert foreign.sum() == len(list(taken_away(library))) * SAMPLES
    assert np.isinf(held.scores[foreign]).sum(axis=1).tolist() == [round(0.4 * EXPERTS)] * foreign.sum()


def test_a_region_is_an_anchor_and_what_is_nearest_to_it(library: Library) -> None:
    for inner, gone in taken_away(library):
        assert inner[0] == gone[0]
        assert set(inner) <= set(gone)
        rest = without(library, np.setdiff1d(np.arange(EXPERTS), gone))
        assert len(rest) == EXPERTS - len(gone)


def test_anchors_are_far_from_each_other() -> None:
    at = np.array([0.0, 0.1, 0.2, 5.0, 9.9, 10.0])
    chosen = farthest(-np.abs(at[:, None] - at), 3)
    assert len(set(chosen)) == 3
    assert {at[k] for k in chosen} == {at[chosen[0]], 10.0, 0.0}


@pytest.mark.parametrize("n", [1, 2])
def test_small_libraries_have_no_regions(make_expert: MakeExpert, n: int) -> None:
    rng = np.random.default_rng(0)
    experts = [make_expert(f"e{k}", "a", "b") for k in range(n)]
    stored = {expert.id: directions(rng, rng.standard_normal((1, DIM)), 2, 0.1) for expert in experts}
    small = build(experts, lambda texts: np.zeros((0, DIM), np.float32), DIM, stored=stored)
    assert list(taken_away(small)) == []
    outside = [("x", directions(rng, rng.standard_normal((1, DIM)), 1, 0)[0])] * 3
    found = hold_out(Retrieval, SETTINGS, small, outside=outside)
    assert sorted(found.own.tolist()) == sorted([-1] * 3 + list(range(n)) * 2)


def test_nothing_to_hold_out_says_so(make_expert: MakeExpert) -> None:
    rng = np.random.default_rng(0)
    experts = [make_expert("a", "one"), make_expert("b", "one")]
    stored = {expert.id: directions(rng, rng.standard_normal((1, DIM)), 1, 0.1) for expert in experts}
    lone = build(experts, lambda texts: np.zeros((0, DIM), np.float32), DIM, stored=stored)
    outside = [("x", stored[experts[0].id][0])]
    held = hold_out(Retrieval, SETTINGS, lone, outside=outside)
    with pytest.raises(ValueError, match="No expert has two samples"):
        calibrate(held, Retrieval.fit(lone, SETTINGS), SETTINGS, far=0.05)
    with pytest.raises(ValueError, match="No expert has two samples"):
        hold_out(Retrieval, SETTINGS, lone)


# Calibrating


def fresh(library: Library, method: Retrieval, seed: int) -> HeldOut:
    """New prompts of the same experts and of others that are not there."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).standard_normal((EXPERTS, DIM))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    strange = rng.standard_normal((40, DIM))
    strange /= np.linalg.norm(strange, axis=1, keepdims=True)
    rows = np.concatenate([directions(rng, centres, 50, NOISE), directions(rng, strange, 5, NOISE)])
    everyone = np.ones(EXPERTS, bool)
    scores = np.stack([method.score(Query("", row, everyone)) for row in rows])
    own = np.concatenate([np.repeat(np.arange(EXPERTS), 50), np.full(200, -1)])
    assert method.thresholds is not None
    return HeldOut(scores, method.thresholds[scores.argmax(axis=1)], own, np.zeros(len(own), int))


@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_confidence_becomes_the_probability_of_being_right(library: Library, held: HeldOut, factor: float) -> None:
    """Of a router that is far too sure of itself, or not half sure enough."""
    method = Retrieval.fit(library, SETTINGS)
    method.temperature *= factor
    found, report = calibrate(held, method, SETTINGS, far=0.05)
    assert report.ece_after < report.ece_before / 2
    new = fresh(library, method, seed=1)
    weights = weigh(new, 0.1)
    plain, after = outcome(new, Calibration(temperature=method.temperature)), outcome(new, found)
    error = calibration_error(after.confidence, after.right, weights)
    assert error < calibration_error(plain.confidence, plain.right, weights)
    assert error < 0.1


def test_the_outcome_is_what_decide_decides(library: Library, held: HeldOut) -> None:
    plain = Retrieval.fit(library, SETTINGS)
    found, _ = calibrate(held, plain, SETTINGS, far=0.2)
    method = calibrated(plain, found.model_dump(mode="json"), SETTINGS, "")
    assert method is not plain
    new = fresh(library, plain, seed=2)
    fast = outcome(new, found)
    for row in range(0, len(new), 37):
        query = Query("", library.prototypes[0][0], np.ones(EXPERTS, bool))
        decided = decide("x", _Fixed(method, new.scores[row]), library, query)
        assert (decided.kind != "base") == fast.answered[row]
        assert decided.confidence == pytest.approx(fast.confidence[row])


class _Fixed(Retrieval):
    """A method that has these scores for every prompt."""

    def __init__(self, method: Retrieval, scores: np.ndarray) -> None:
        self.__dict__.update(method.__dict__)
        self._fixed = scores

    def score(self, query: Query) -> np.ndarray:
        return self._fixed


@settings(max_examples=60, deadline=None)
@given(excess=st.lists(st.floats(-1, 1), min_size=1, max_size=60), far=st.sampled_from([0.01, 0.05, 0.2, 0.5]))
def test_no_more_than_the_wanted_share_is_let_through(excess: list[float], far: float) -> None:
    values = np.array(excess)
    shift = threshold_shift(values, far)
    assert (values >= shift).mean() <= far
    if len(set(excess)) == len(excess):  # and not many fewer
        assert (values >= shift).sum() >= np.floor((len(values) + 1) * far + 1e-9) - 1


def test_a_method_that_never_abstains_keeps_answering(library: Library, held: HeldOut) -> None:
    method = fitted(Random, library, Random.Settings())
    assert method.thresholds is None
    found, report = calibrate(held, method, Random.Settings(), far=0.05)
    assert found.shift == 0
    assert report.far_after == 1
    assert calibrated(method, found.model_dump(mode="json"), Random.Settings(), "").thresholds is None


def test_few_decisions_keep_the_softmax(library: Library, held: HeldOut) -> None:
    few = held.take(np.arange(len(held)) % 20 == 0)
    found, _ = calibrate(few, Retrieval.fit(library, SETTINGS), SETTINGS, far=0.05)
    assert found.answered is None
    assert found.probability(0.3, answered=True) == 0.3


def test_it_is_the_same_every_time(library: Library, held: HeldOut) -> None:
    method = Retrieval.fit(library, SETTINGS)
    again = hold_out(Retrieval, SETTINGS, library)
    assert calibrate(held, method, SETTINGS, far=0.1) == calibrate(again, method, SETTINGS, far=0.1)
    assert isinstance(calibrate(held, method, SETTINGS, far=0.1)[1], Report)


@pytest.mark.parametrize(
    "stored",
    [None, {}, {"temperature": -1}, {"temperature": 1.0, "settings": "{}"}, {"temperature": 1.0, "unknown": 2}],
)
def test_a_calibration_for_something_else_is_not_used(library: Library, stored: object) -> None:
    method = Retrieval.fit(library, SETTINGS)
    assert calibrated(method, stored, SETTINGS, "") is method


def test_a_calibration_of_another_encoder_is_not_used(library: Library) -> None:
    method = Retrieval.fit(library, SETTINGS)
    stored = Calibration(settings=SETTINGS.model_dump_json(), encoder="a", temperature=1).model_dump(mode="json")
    assert calibrated(method, stored, SETTINGS, "b") is method
    assert calibrated(method, stored, SETTINGS, "a").temperature == 1


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    confidence = np.array([0.95] * 10 + [0.55] * 10)
    right = np.array([True] * 5 + [False] * 5 + [True] * 5 + [False] * 5)
    assert calibration_error(confidence, right) == pytest.approx((0.45 + 0.05) / 2)
    only = np.array([1.0] * 10 + [0.0] * 10)
    assert calibration_error(confidence, right, only) == pytest.approx(0.45)


def test_candidate_sets_hold_the_right_expert_as_promised(library: Library, held: HeldOut) -> None:
    method = Retrieval.fit(library, SETTINGS)
    found, _ = calibrate(held, method, SETTINGS, far=0.05)
    new = fresh(library, method, seed=3)
    own = new.own >= 0
    ranks = (new.scores[own] > new.scores[own, new.own[own]][:, None]).sum(axis=1)
    for alpha in (0.2, 0.05):
        sizes = np.array([found.size(each, alpha) for each in new.scores[own]])
        assert (ranks < sizes).mean() >= 1 - alpha - 0.06
    assert found.size(new.scores[0], 1e-6) == EXPERTS  # too little is known to promise that


def test_curves_are_flat_beyond_their_ends() -> None:
    curve = Curve(x=(0.2, 0.6), y=(0.1, 0.9))
    np.testing.assert_allclose(curve.at(np.array([0.0, 0.4, 1.0])), [0.1, 0.5, 0.9])
