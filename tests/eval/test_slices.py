from __future__ import annotations

from collections import Counter
from typing import get_args

import pytest

from eval.columns import Asked
from eval.compare_cli import By as OfCommand
from eval.slices import BadSlice, By, Where, slices

SHORT = Asked("add/0", "add", ("add",), ("even", "a, b=c"), 20, "exact_match")
LONG = Asked("both/1", "compositions", ("add", "reverse"), ("odd",), 300, "exact_match")
STRANGE = Asked("strange/2", "strange", (), (), 30, "none")


@pytest.mark.parametrize(
    ("given", "held"),
    [
        ("tag=even", {SHORT}),
        ("tag != even", {LONG, STRANGE}),
        ("task=compositions", {LONG}),
        ("expert=add", {SHORT, LONG}),
        ("expert!=add", {STRANGE}),
        ("length<30", {SHORT}),
        ("length<=30", {SHORT, STRANGE}),
        ("length>20, length<300", {STRANGE}),
        ("length=300", {LONG}),
        ("length!=300", {SHORT, STRANGE}),
        (["expert=add", "length>=300"], {LONG}),
        ("tag=a, b=c", {SHORT}),
        ("", {SHORT, LONG, STRANGE}),
        (None, {SHORT, LONG, STRANGE}),
    ],
)
def test_all_terms_have_to_hold(given: str | list[str] | None, held: set[Asked]) -> None:
    assert {each for each in (SHORT, LONG, STRANGE) if Where.parse(given).holds(each)} == held


def test_regimes_are_chosen_apart_from_examples() -> None:
    assert Where.parse("regime=ood, tag=even").regimes == ("ood",)
    assert Where.parse("regime!=ood").regimes == ("in-distribution", "semi-ood")
    assert Where.parse("regime=ood").holds(STRANGE)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ("even", "'even': no slice"),
        ("owner=add", "no slice"),
        ("length<long", "whole number"),
        ("task<add", "use task=add"),
        ("regime=odd", "There are: in-distribution, semi-ood, ood"),
    ],
)
def test_a_slice_that_cannot_be_read_says_what_would_work(given: str, why: str) -> None:
    with pytest.raises(BadSlice, match=why):
        Where.parse(given)


def test_slices_by_a_name_are_of_every_value() -> None:
    assert slices("task", [SHORT, LONG, STRANGE]) == ["task=add", "task=compositions", "task=strange"]
    assert slices("expert", [SHORT, LONG, STRANGE]) == ["expert=add", "expert=reverse"]
    assert slices("tag", [STRANGE]) == []
    assert Where.parse(["tag=a, b=c"]).terms == (("tag", "=", "a, b=c"),)


@pytest.mark.parametrize("lengths", [range(40), [5] * 40, [1] * 30 + [7, 8, 9], [3]])
def test_quarters_hold_every_example_once(lengths: list[int]) -> None:
    examples = [Asked(f"a/{n}", "a", (), (), length, "none") for n, length in enumerate(lengths)]
    found = [Where.parse(each) for each in slices("length", examples)]
    held = Counter(where.text for each in examples for where in found if where.holds(each))
    assert sum(held.values()) == len(examples)
    assert set(held) == {where.text for where in found}
    assert list(held.values()) == [10] * 4 or len(set(lengths)) < 40


def test_there_are_no_other_ways_to_slice() -> None:
    assert get_args(By) == get_args(OfCommand)
    with pytest.raises(BadSlice, match="tag, task, expert, length"):
        slices("colour", [SHORT])  # type: ignore[arg-type]
