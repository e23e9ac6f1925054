"""Answers by log-likelihood."""

from __future__ import annotations

import pytest

from eval.scoring import METRICS, CannotScore

YES_OR_NO = {"choices": (" yes", " certainly not"), "gold": 1}


def test_the_likeliest_choice_is_the_answer(example, reply):
    accuracy = METRICS["accuracy"]
    assert accuracy.needs == "choices"
    assert accuracy.asks(example(**YES_OR_NO)) == (" yes", " certainly not")
    assert accuracy.score(example(**YES_OR_NO), reply((-2.0, 1), (-1.9, 2))) == 1
    assert accuracy.score(example(**YES_OR_NO), reply((-2.0, 1), (-3.0, 2))) == 0


def test_by_length_a_long_choice_may_be_less_likely(example, reply):
    normed = METRICS["accuracy_norm"]
    assert normed.score(example(**YES_OR_NO), reply((-3.0, 1), (-12.9, 2))) == 1  # 3 / 3 against 12.9 / 13
    assert normed.score(example(**YES_OR_NO), reply((-3.0, 1), (-13.1, 2))) == 0


def test_of_equally_likely_choices_the_first_is_the_answer(example, reply):
    assert METRICS["accuracy"].score(example(**YES_OR_NO), reply((-1.0, 1), (-1.0, 1))) == 0


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({}, "0 choices"),
        ({"choices": ("a",), "gold": 0}, "1 choices"),
        ({"choices": ("a", "b")}, "right choice is None"),
        ({"choices": ("a", "b"), "gold": 2}, "right choice is 2, not one of 0 to 1"),
        ({"choices": ("a", "b"), "gold": -1}, "right choice is -1"),
        ({"choices": ("a", " "), "gold": 0}, "choice 1 is empty"),
    ],
)
@pytest.mark.parametrize("name", ["accuracy", "accuracy_norm"])
def test_choices_that_cannot_be_scored_are_named(example, reply, name, fields, problem):
    assert problem in METRICS[name].lacks(example(**fields))
    with pytest.raises(CannotScore, match=problem):
        METRICS[name].score(example(**fields), reply((-1.0, 1), (-1.0, 1)))


def test_the_log_likelihood_is_per_token_of_the_right_answer(example, reply):
    metric = METRICS["log_likelihood"]
    assert metric.needs == "likelihood"
    assert metric.asks(example("a", "b")) == ("a", "b")
    assert metric.asks(example(**YES_OR_NO)) == (" certainly not",)
    assert metric.score(example("a", "b"), reply((-6.0, 3), (-6.0, 4))) == -1.5
    assert "no right answer" in metric.lacks(example())
    with pytest.raises(CannotScore, match="no right answer"):
        metric.score(example(), reply())


@pytest.mark.parametrize("name", ["accuracy", "accuracy_norm", "log_likelihood"])
def test_a_reply_with_too_few_log_likelihoods_has_no_score(example, reply, name):
    with pytest.raises(CannotScore, match="0 log-likelihoods came for"):
        METRICS[name].score(example(**YES_OR_NO), reply())
