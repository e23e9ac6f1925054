"""The figures of a report, from answers and decisions that are made up."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters_registry.expert import Expert, Sample, State
from router.joining import Joining, Moved, Own, Row
from router.triggers import Shift
from serving.checks import others, triggers
from serving.checks.asking import Question, read_answer
from serving.checks.others import Regression, confusion
from serving.checks.own_task import OwnTask


def expert(name, samples=4, answers=None, version=1):
    count = samples if answers is None else answers
    asked = tuple(Sample(prompt=f"{name} {k}", answer=str(k) if k < count else None) for k in range(samples))
    return Expert(
        name=name, version=version, digest=name * 12, state=State.ACTIVE, path=Path(), base_model="b", rank=1,
        target_modules=(), source="s", samples=asked,
    )  # fmt: skip


def moved(name, *samples, before="", after="new"):
    return tuple(Moved(name, k, f"{name} {k}", before or name, after) for k in samples)


def row(name, samples, lost=0, elsewhere=0, abstained=0):
    after = samples - lost - elsewhere - abstained
    return Row(name, samples, samples, after, lost, 0, abstained, elsewhere)


def scores(table):
    """`score(who, sample)` of {name of who, None for the base model: the prompts that are answered rightly}."""
    return lambda who, sample: float(sample.prompt in table.get(None if who is None else who.name, ()))


# Its own task


def test_the_gain_is_over_the_best_of_those_who_could_answer():
    new, old = expert("new"), expert("old")
    task = OwnTask(new, None, new.samples, [old, old, None, None])
    right = {"new": {"new 0", "new 1", "new 2"}, "old": {"new 0"}, None: {"new 1", "new 2"}}
    section = task.section(scores(right), 0.0)
    assert (section.figure, section.passed) == (0.25, True)
    assert [(each["who"], each["score"]) for each in section.rows] == [
        ("this version", 0.75),
        ("the base model", 0.5),
        ("whoever answers now", 0.5),
        ("of these, old", 0.5),
        ("of these, the base model", 0.5),
    ]


def test_as_good_as_the_base_model_is_not_enough_but_for_what_is_perfect():
    new = expert("new")
    task = OwnTask(new, None, new.samples, [None] * 4)
    half = {"new 0", "new 1"}
    assert task.section(scores({"new": half, None: half}), 0.0).passed is False
    every = {sample.prompt for sample in new.samples}
    assert task.section(scores({"new": every, None: every}), 0.0).passed is True


def test_a_sample_that_somebody_could_not_be_asked_does_not_count():
    new, old = expert("new"), expert("old")
    task = OwnTask(new, None, new.samples, [old] * 4)

    def score(who, sample):
        if who is old and sample.prompt != "new 0":
            return None
        return float(who is new)

    section = task.section(score, 0.0)
    assert (section.figure, section.rows[0]["samples"]) == (1.0, 1)
    nobody = task.section(lambda who, sample: None, 0.0)
    assert (nobody.passed, nobody.detail) == (None, "not measured: its samples could not be asked")


# Others


def test_one_lost_sample_of_a_few_proves_nothing_and_two_do():
    one = Joining("new", rows=(row("a", 4, lost=1), row("b", 4)), moved=moved("a", 0), own=())
    assert (confusion(one, 0.25).figure, confusion(one, 0.25).passed) == (0.0, True)
    two = Joining(
        "new", rows=(row("a", 4, lost=2), row("b", 4, elsewhere=1)), moved=(), own=(Own(0, "x", None, "new"),)
    )
    section = confusion(two, 0.25)
    assert (section.figure, section.passed) == (0.5, False)
    assert [each["expert"] for each in section.rows] == ["a", "b"]
    assert "of its own 1 samples it would get 1" in section.detail


def test_nobody_to_take_from_is_no_confusion():
    section = confusion(Joining("new", rows=(), moved=(), own=()), 0.25)
    assert (section.figure, section.passed) == (0.0, True)


def regression(*experts, moves, rows):
    new = expert("new")
    joined = Joining("new", rows=rows, moved=tuple(moves), own=())
    return Regression.of(new, joined, {each.name: each for each in experts})


def test_the_figure_is_the_largest_drop_over_all_samples_of_one_expert():
    found = regression(
        expert("a"), expert("b"), moves=moved("a", 0, 1) + moved("b", 2), rows=(row("a", 4, 2), row("b", 4, 1))
    )
    section = found.section(scores({"a": {"a 0", "a 1"}, "b": set(), "new": {"a 1", "b 2"}}), 0.1)
    assert (section.figure, section.passed) == (0.25, False)
    assert [(each["expert"], each["change"]) for each in section.rows] == [("a", -0.25), ("b", 0.25)]
    assert "of 3 samples of others that would move to it, 2 are answered exactly now, 2 with it" in section.detail


def test_what_moves_elsewhere_or_had_been_an_older_version_s_is_not_scored():
    moves = (*moved("a", 0, after="b"), *moved("a", 1, before="new", after="b"), *moved("a", 2, after=None))
    found = regression(expert("a"), moves=moves, rows=(row("a", 4),))
    assert list(found.pairs()) == []
    assert found.section(scores({}), 0.1).passed


def test_moves_without_answers_measure_nothing():
    found = regression(expert("a", answers=0), moves=moved("a", 0, 1), rows=(row("a", 4, 2),))
    section = found.section(lambda who, sample: None, 0.1)
    assert (section.passed, section.figure) == (None, None)
    assert "none of the 2 samples that would move to it has an answer" in section.detail


def test_of_too_many_moves_some_of_every_expert_s_are_asked(monkeypatch):
    monkeypatch.setattr(others, "MOST_MOVED", 4)
    found = regression(
        expert("a", 6), expert("b", 2), moves=moved("a", *range(6)) + moved("b", 0, 1), rows=(row("a", 6), row("b", 2))
    )
    assert [each.expert for each, _ in found.moved] == ["a", "b", "a", "b"]
    assert found.left_out == 4
    assert "4 were not asked" in found.section(scores({}), 0.1).detail


# Neutral prompts


def test_a_shift_that_is_no_number_never_passes():
    peers = [Shift(1.0, 0.5, 8)] * 6
    broken = triggers.section(Shift(float("nan"), 1.0, 8), peers, 5.0)
    assert (broken.passed, broken.figure) == (False, 1000.0)
    assert triggers.section(Shift(float("nan"), 1.0, 8), peers[:2], 5.0).passed is False


def test_prompts_that_suit_nobody_measure_nothing():
    assert triggers.section(Shift(0.0, 0.0, 0), [], 5.0).passed is None


# Questions


@pytest.mark.parametrize(("answer", "tokens"), [("yes", 11), ("é" * 3, 14), ("x" * 1000, 256), (None, 8)])
def test_an_answer_may_be_as_long_as_it_should_be_and_a_little_longer(answer, tokens):
    assert Question.of(Sample(prompt="p", answer=answer)) == Question("p", tokens)


def test_answers_of_both_endpoints_are_read_alike():
    steps = (("a", {"a": -0.5, "b": -2.0}),)
    top = [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -2.0}]
    chat = {
        "message": {"content": "a"},
        "logprobs": {"content": [{"token": "a", "logprob": -0.5, "top_logprobs": top}]},
    }
    plain = {"text": "a", "logprobs": {"tokens": ["a"], "top_logprobs": [{"a": -0.5, "b": -2.0}]}}
    assert read_answer(chat) == read_answer(plain) == ("a", steps)
    assert read_answer({"message": {"content": None}, "logprobs": None}) == ("", ())
