from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.conformal import Form, conformal_size, nonconformity, quantile, softmax

FORMS: list[Form] = ["lac", "aps", "raps"]
forms = pytest.mark.parametrize("form", FORMS)


def by_loop(probabilities: list[float], limit: float, form: Form) -> set[int]:
    """The slow twin: who is in the set, one expert at a time."""
    inside = set()
    for k, mine in enumerate(probabilities):
        before = [p for j, p in enumerate(probabilities) if p > mine or (p == mine and j < k)]
        own = 1 - mine if form == "lac" else sum(before) + mine
        if form == "raps":
            own += 0.01 * max(len(before) + 1 - 3, 0)
        if own <= limit + 1e-12:
            inside.add(k)
    return inside


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 5), min_size=1, max_size=12),
    limit=st.floats(0, 1.2),
    form=st.sampled_from(FORMS),
)
def test_sets_are_those_of_a_loop_and_hold_the_most_probable(weights: list[float], limit: float, form: Form) -> None:
    p = np.array(weights) / sum(weights)
    slow = by_loop(p.tolist(), limit, form)
    size = conformal_size(p, limit, form)
    assert size == max(1, len(slow))
    assert slow == set(np.argsort(-p, kind="stable")[: len(slow)].tolist())


def test_the_quantile_counts_the_prompt_to_come() -> None:
    held = [0.1, 0.2, 0.3, 0.4]
    assert quantile(held, 0.5) == 0.3  # the third of four: ceil(5 * 0.5)
    assert quantile(held, 0.2) == 0.4
    assert quantile(held, 0.19) == math.inf  # four prompts cannot promise more than 4/5
    assert quantile([], 0.1) == math.inf


@forms
@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_the_right_expert_is_in_the_set_as_often_as_promised(form: Form, alpha: float) -> None:
    """Exchangeable prompts whose probabilities are wrong in every way: too sure, and biased towards one expert."""
    rng = np.random.default_rng(0)
    truth = rng.dirichlet(np.full(8, 0.4), size=6000)
    own = (truth.cumsum(axis=1) > rng.random((len(truth), 1))).argmax(axis=1)
    told = softmax(3 * np.log(truth + 1e-9) + np.array([2.0, *[0.0] * 7]), 1.0)
    scores = nonconformity(told, form)[np.arange(len(own)), own]
    limit = quantile(scores[:3000], alpha)
    ranks = (told > told[np.arange(len(own)), own][:, None]).sum(axis=1)
    sizes = np.array([conformal_size(each, limit, form) for each in told[3000:]])
    covered = (ranks[3000:] < sizes).mean()
    assert covered >= 1 - alpha - 0.02  # 3.5 standard deviations
    if form == "lac":
        assert covered <= 1 - alpha + 0.02 or sizes.mean() == 1


def test_lac_sets_are_the_smallest() -> None:
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.full(10, 0.5), size=4000)
    own = (p.cumsum(axis=1) > rng.random((len(p), 1))).argmax(axis=1)
    sizes = {}
    for form in FORMS:
        limit = quantile(nonconformity(p, form)[np.arange(2000), own[:2000]], 0.1)
        sizes[form] = np.mean([conformal_size(each, limit, form) for each in p[2000:]])
    assert sizes["lac"] <= min(sizes.values()) + 1e-9


def test_experts_that_are_not_considered_are_improbable() -> None:
    p = softmax(np.array([[1.0, -np.inf, 2.0], [-np.inf, -np.inf, -np.inf]]), 1.0)
    assert p[0, 1] == 0
    assert p[0].sum() == pytest.approx(1)
    assert not p[1].any()
