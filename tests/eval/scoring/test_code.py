"""pass@k: programs, right when they pass their tests."""

from __future__ import annotations

from itertools import combinations

import pytest

from eval.asking import Prompt
from eval.scoring import KS, METRICS, CannotScore, scorers
from eval.scoring.code import pass_at, program

CODE = scorers(allow_code=True)
DOUBLE = {"tests": "assert double(4) == 8"}
RIGHT, WRONG = "def double(x):\n    return x + x", "def double(x):\n    return x ** 2"


def test_programs_run_only_where_it_is_allowed(example, reply):
    with pytest.raises(CannotScore, match="--allow-code"):
        METRICS["pass@1"].score(example(**DOUBLE), reply(RIGHT))
    assert CODE.keys() == METRICS.keys()


def test_an_answer_is_right_when_it_passes_its_tests(example, reply):
    assert CODE["pass@1"].score(example(**DOUBLE), reply(RIGHT)) == 1
    assert CODE["pass@1"].score(example(**DOUBLE), reply(WRONG)) == 0


def test_a_program_that_ends_before_its_tests_is_wrong(example, reply):
    for early in ("raise SystemExit", "import sys\nsys.exit(0)", "import os\nos._exit(0)"):
        assert CODE["pass@1"].score(example(**DOUBLE), reply(early)) == 0


def test_of_several_answers_pass_at_k_is_estimated(example, reply):
    several = example(**DOUBLE, n=4, temperature=0.8)
    answers = reply(RIGHT, WRONG, RIGHT, "not a program")
    assert CODE["pass@1"].score(several, answers) == pytest.approx(1 / 2)
    assert CODE["pass@2"].score(several, answers) == pytest.approx(5 / 6)
    with pytest.raises(CannotScore, match="n is 4: 'pass@5' needs 5 answers or more"):
        CODE["pass@5"].score(several, answers)


def test_the_estimate_is_the_share_of_draws_with_a_right_answer():
    for n in range(1, 7):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(combinations([True] * c + [False] * (n - c), k))
                assert pass_at(k, n, c) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_a_completion_goes_on_with_its_prompt(example):
    begun = Prompt(text="def double(x):\n", form="completion")
    assert program(example(prompt=begun, **DOUBLE), "    return x + x").startswith("def double(x):\n    return x + x\n")
    assert program(example(**DOUBLE), RIGHT).startswith(RIGHT)


def test_of_a_chat_s_answer_an_expression_takes_the_program(example, reply):
    fenced = example(extract=r"(?s)```python\n(.*?)```", **DOUBLE)
    assert CODE["pass@1"].score(fenced, reply(f"Here it is:\n```python\n{RIGHT}\n```\nIt adds.")) == 1


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({}, "no tests"),
        ({"tests": "\n"}, "no tests"),
        ({**DOUBLE, "n": 1}, "n is 1: 'pass@5' needs 5 answers or more"),
        ({**DOUBLE, "n": 5}, "n is 5 at temperature 0"),
    ],
)
def test_examples_that_cannot_be_scored_are_named(example, fields, problem):
    assert problem in METRICS["pass@5"].lacks(example(**fields))


def test_pass_at_k_needs_texts(example):
    for k in KS:
        metric = METRICS[f"pass@{k}"]
        assert (metric.needs, metric.asks(example())) == ("code", ())
        assert metric.lacks(example(**DOUBLE, n=k, temperature=0.5)) is None
