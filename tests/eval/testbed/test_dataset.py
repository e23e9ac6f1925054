from __future__ import annotations

import pytest

from eval.testbed import dataset
from eval.testbed.compositions import COMPOSITIONS, PROMPTS
from eval.testbed.ood import OOD
from eval.testbed.tasks import BY_NAME, TASKS


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_samples_and_tests_are_as_many_as_promised_distinct_and_disjoint(task) -> None:  # type: ignore[no-untyped-def]
    samples = {record["prompt"] for record in dataset.samples(task, 7)}
    tests = {record["prompt"] for record in dataset.tests(task, 7)}
    assert len(samples) == dataset.SAMPLES == 20
    assert len(tests) == dataset.TESTS == 60
    assert not samples & tests


def test_data_depend_on_the_seed_alone() -> None:
    task = BY_NAME["reverse"]
    assert dataset.tests(task, 7) == dataset.tests(task, 7)
    assert dataset.tests(task, 7) != dataset.tests(task, 8)


def test_eight_compositions_chain_two_experts_that_exist() -> None:
    assert len(COMPOSITIONS) == 8
    assert len({composition.name for composition in COMPOSITIONS}) == 8
    for composition in COMPOSITIONS:
        assert {composition.first, composition.second} <= set(BY_NAME)
        assert len({record["prompt"] for record in composition.records(7)}) == PROMPTS


def test_a_composition_answers_with_the_second_of_the_first() -> None:
    reverse_upper = COMPOSITIONS[0]
    assert (reverse_upper.first, reverse_upper.second) == ("reverse", "uppercase")
    for record in reverse_upper.records(7):
        assert record["answer"][::-1].lower() in record["prompt"]
        assert record["answer"].isupper()


def test_a_hundred_distinct_out_of_domain_prompts_are_no_test_prompts() -> None:
    tests = {record["prompt"] for task in TASKS for record in dataset.tests(task, 7)}
    assert len(set(OOD)) == 100
    assert not set(OOD) & tests
