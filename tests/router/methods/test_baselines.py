from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from adapters_registry.expert import Expert
from router.library import Library, build
from router.method import MethodSettings, Query, decide
from router.methods.base import Base
from router.methods.random import Random

MakeExpert = Callable[..., Expert]


@pytest.fixture
def library(words: Any, make_expert: MakeExpert) -> Library:
    return build([make_expert(name, name) for name in ("a", "b", "c", "d")], words.encode, words.dim)


def query(library: Library, text: str, among: list[bool] | None = None) -> Query:
    mask = np.ones(len(library), bool) if among is None else np.array(among, bool)
    return Query(text, np.zeros(library.dim, np.float32), mask)


def test_the_base_method_always_abstains(library: Library) -> None:
    decision = decide("base", Base.fit(library, MethodSettings()), library, query(library, "Hi"))
    assert (decision.kind, decision.candidates) == ("base", ())


def test_random_is_the_same_for_the_same_prompt_and_even_over_many(library: Library) -> None:
    method = Random.fit(library, MethodSettings())
    picks = [decide("random", method, library, query(library, f"prompt {n}")).experts[0].expert for n in range(400)]
    again = decide("random", Random.fit(library, MethodSettings()), library, query(library, "prompt 7"))
    assert again.experts[0].expert == picks[7]
    assert min(Counter(picks)[name] for name in "abcd") > 60


def test_the_random_score_of_an_expert_does_not_depend_on_the_others(library: Library, words: Any) -> None:
    fewer = build(library.experts[1:3], words.encode, words.dim)
    whole = Random.fit(library, MethodSettings()).score(query(library, "Hi"))
    part = Random.fit(fewer, MethodSettings()).score(query(fewer, "Hi"))
    np.testing.assert_array_equal(whole[1:3], part)
