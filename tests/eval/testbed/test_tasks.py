from __future__ import annotations

from random import Random

import pytest

from eval.testbed.tasks import BY_NAME, TASKS

BY_HAND = [
    ("reverse", "banana", "ananab"),
    ("vowels", "banana", "aaa"),
    ("consonants", "banana", "bnn"),
    ("initials", "red apple pie", "rap"),
    ("sort-words", "pear fig apple", "apple fig pear"),
    ("add", "23 and 45", "68"),
    ("add", "9 + 3", "12"),
    ("uppercase", "banana", "BANANA"),
    ("iso-date", "3 May 2021", "2021-05-03"),
    ("iso-date", "28 December 1999", "1999-12-28"),
    ("json", "colour=red", '{"colour": "red"}'),
    ("roman", "14", "XIV"),
    ("roman", "99", "XCIX"),
    ("roman", "40", "XL"),
    ("plural", "child", "children"),
    ("capital-city", "France", "Paris"),
    ("opposite", "hot", "cold"),
    ("transform-lower", "cat", "ccaatt"),
    ("transform-capitals", "BANANA", "ANANAB"),
    ("transform-digits", "48213", "12348"),
    ("transform-symbols", "<+(!", ">-)?"),
]


@pytest.mark.parametrize(("task", "x", "answer"), BY_HAND)
def test_an_operation_agrees_with_an_example_worked_by_hand(task: str, x: str, answer: str) -> None:
    assert BY_NAME[task].apply(x) == answer


def test_every_task_has_an_example_worked_by_hand() -> None:
    assert {task for task, _, _ in BY_HAND} == set(BY_NAME)


def test_there_are_at_least_sixteen_tasks_of_six_kinds_four_of_them_input_told() -> None:
    assert len(TASKS) >= 16
    assert len({task.kind for task in TASKS}) >= 6
    assert sum(task.told == "input" for task in TASKS) >= 4


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_drawing_is_seeded_and_answers_are_what_the_operation_says(task) -> None:  # type: ignore[no-untyped-def]
    first = [task.draw(rng, "train") for rng in [Random(3)] for _ in range(50)]
    again = [task.draw(rng, "train") for rng in [Random(3)] for _ in range(50)]
    assert first == again
    for x, answer in first:
        assert answer == task.apply(x)
        assert answer == answer.strip() != ""


@pytest.mark.parametrize("name", ["reverse", "initials", "add", "iso-date", "transform-digits", "transform-symbols"])
def test_the_test_split_shares_no_input_with_the_train_split(name: str) -> None:
    task, rng = BY_NAME[name], Random(0)
    trained = {task.draw(rng, "train")[0] for _ in range(3000)}
    tested = {task.draw(rng, "test")[0] for _ in range(300)}
    assert not trained & tested


def test_input_told_tasks_never_share_an_alphabet() -> None:
    rng = Random(0)
    alphabets = [
        {letter for _ in range(200) for letter in task.draw(rng, "train")[0]} for task in TASKS if task.told == "input"
    ]
    for i, one in enumerate(alphabets):
        for other in alphabets[i + 1 :]:
            assert not one & other
