from __future__ import annotations

from random import Random

import pytest

from eval.testbed.tasks import TASKS, UNSHIPPED
from eval.testbed.wordings import WORDINGS, decorate, random_frame
from eval.testbed.words import FILLER, OPPOSITES, PLURALS, TEST_WORDS, TRAIN_WORDS, WORDS


def _bare(wording: str) -> str:
    """What remains of a wording without quotes, punctuation and case."""
    return "".join(c for c in wording.lower() if c.isalnum() or c in " {}").strip()


@pytest.mark.parametrize("task", sorted(WORDINGS))
def test_unseen_wordings_are_no_registered_ones_not_even_but_for_quotes_and_case(task: str) -> None:
    wordings = WORDINGS[task]
    assert not {_bare(w) for w in wordings.registered} & {_bare(w) for w in wordings.unseen}


@pytest.mark.parametrize("task", sorted(WORDINGS))
def test_every_task_has_many_wordings_each_with_one_place_for_the_input(task: str) -> None:
    wordings = WORDINGS[task]
    assert len(set(wordings.registered)) >= 12
    assert len(set(wordings.unseen)) >= 6
    for wording in (*wordings.registered, *wordings.unseen):
        assert wording.count("{x}") == 1


def test_every_task_has_wordings() -> None:
    assert set(WORDINGS) == {task.name for task in (*TASKS, *UNSHIPPED)}


def test_input_told_tasks_share_their_wordings_and_no_two_others_do() -> None:
    told = {task.name for task in TASKS if task.told == "input"}
    assert len({WORDINGS[name] for name in told}) == 1
    assert len({WORDINGS[name] for name in WORDINGS}) == len(WORDINGS) - len(told) + 1


def test_decoration_keeps_the_words_and_the_place_of_the_input() -> None:
    rng = Random(0)
    for _ in range(2000):
        wording = rng.choice(WORDINGS["reverse"].registered)
        decorated = decorate(wording, rng)
        assert decorated.count("{x}") == 1
        assert _bare(wording) in _bare(decorated)


def test_random_frames_hold_the_input_once() -> None:
    rng = Random(0)
    assert all(random_frame(rng).count("{x}") == 1 for _ in range(500))


def test_words_are_well_formed_and_split_without_overlap() -> None:
    assert len(WORDS) == len(set(WORDS))
    assert not set(TRAIN_WORDS) & set(TEST_WORDS)
    assert set(TRAIN_WORDS) | set(TEST_WORDS) <= set(WORDS)
    for word in WORDS:
        assert 3 <= len(word) <= 8
        assert word.isascii()
        assert set(word) & set("aeiou"), word
        assert set(word) - set("aeiou"), word


def test_no_input_word_is_an_instruction_word_but_for_one() -> None:
    assert set(FILLER) & {*WORDS, *PLURALS, *OPPOSITES} == {"mirror"}
