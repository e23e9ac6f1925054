"""Answers in words: what counts as right."""

from __future__ import annotations

import sys

import pytest

from eval.extra import ExtraMissing, extra
from eval.scoring import METRICS, CannotScore
from eval.scoring.text import extracted


def scored(name, example, reply, answer, *right, **fields):
    return METRICS[name].score(example(*right, **fields), reply(answer))


@pytest.mark.parametrize(
    ("name", "answer", "right", "score"),
    [
        ("exact_match", " ananab\n", ["ananab"], 1),
        ("exact_match", "Ananab", ["ananab"], 0),
        ("exact_match", "b", ["a", "b"], 1),
        ("exact_match_loose", "The  answer: YES!", ["answer yes"], 1),
        ("exact_match_loose", "no", ["answer yes"], 0),
        ("number", "So 5 + 7 makes $1,250.", ["1250.0"], 1),
        ("number", "-3", ["3"], 0),
        ("number", "none at all", ["3"], 0),
        ("number", ".5 of it", ["0.50"], 1),
        ("f1", "the cat sat", ["a cat sat down"], 0.8),
        ("f1", "dog", ["a cat", "the dog"], 1),
        ("f1", "", ["cat"], 0),
        ("rouge_l", "the cat sat", ["the cat sat down"], 6 / 7),
        ("rouge_l", "", ["x"], 0),
        ("bleu", "the cat sat on the mat", ["a dog", "the cat sat on the mat"], 1),
        ("bleu", "", ["the cat"], 0),
    ],
)
def test_a_metric_and_what_it_says(example, reply, name, answer, right, score):
    assert scored(name, example, reply, answer, *right) == pytest.approx(score)


@pytest.mark.parametrize("name", ["exact_match", "exact_match_loose", "number", "f1", "rouge_l", "bleu"])
def test_what_cannot_be_scored_is_said(example, reply, name):
    metric = METRICS[name]
    assert metric.needs == "text"
    assert metric.asks(example("a")) == ()
    assert metric.lacks(example("a")) is None
    assert name in metric.lacks(example())
    with pytest.raises(CannotScore, match="t/0: no right answer"):
        metric.score(example(), reply("a"))
    with pytest.raises(CannotScore, match="t/0: the reply has no text"):
        metric.score(example("a"), reply())


def test_several_answers_to_one_prompt_count_for_their_mean(example, reply):
    assert METRICS["exact_match"].score(example("a", n=4), reply("a", "b", "a", "a")) == 0.75


def test_an_expression_says_what_counts_of_an_answer(example, reply):
    assert scored("exact_match", example, reply, "I think #### 7\nno, #### 8", "8", extract=r"#### (\d+)") == 1
    assert scored("exact_match", example, reply, "eight", "8", extract=r"#### (\d+)") == 0
    assert extracted("a (B) c", r"\(([A-D])\)|answer is ([A-D])") == "B"
    assert extracted("the answer is C", r"\(([A-D])\)|answer is ([A-D])") == "C"
    assert extracted("x 12 y 3", r"\d+") == "3"
    assert extracted("as it is", "") == "as it is"


def test_an_expression_that_is_none_is_named(example, reply):
    for name in ("f1", "pass@1"):
        assert (
            METRICS[name].lacks(example("8", tests="1", extract="(8")).startswith("'extract' is no regular expression")
        )
    with pytest.raises(CannotScore, match="t/0: 'extract' is no regular expression: missing"):
        scored("f1", example, reply, "8", "8", extract="(8")


def test_a_prompt_without_a_right_answer_has_no_score(example, reply):
    none = METRICS["none"]
    assert none.needs == "nothing"
    assert (none.lacks(example()), none.asks(example())) == (None, ())
    assert none.score(example(), reply("a")) != none.score(example(), reply("a"))  # NaN


def test_a_package_that_is_not_installed_is_named_with_the_remedy(example, reply, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ExtraMissing, match=r"'sacrebleu': pip install 'moerge\[eval\]'"):
        scored("bleu", example, reply, "a", "a")


def test_a_package_that_is_installed_and_broken_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import nothing_of_this_name\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        extra("half_installed")
