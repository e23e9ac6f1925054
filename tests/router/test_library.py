from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from adapters_registry.expert import Expert
from router.library import Library, build, unit_rows

MakeExpert = Callable[..., Expert]


def of(experts: list[Expert], words: Any, **options: Any) -> Library:
    return build(experts, words.encode, words.dim, **options)


def test_experts_stand_in_the_order_of_their_names_with_their_embedded_samples(
    words: Any, make_expert: MakeExpert
) -> None:
    library = of([make_expert("b", "one two"), make_expert("a", "three", "four five")], words, generation=3)
    assert [expert.name for expert in library.experts] == ["a", "b"]
    assert library.texts == (("three", "four five"), ("one two",))
    np.testing.assert_allclose(library.prototypes[0], words.encode(["three", "four five"]), atol=1e-6)
    assert library.generation == 3


def test_without_samples_the_description_or_else_the_name_stands_for_an_expert(
    words: Any, make_expert: MakeExpert
) -> None:
    library = of([make_expert("a", description="Spells backwards."), make_expert("pig-latin")], words)
    assert library.texts == (("Spells backwards.",), ("pig latin",))


def test_no_experts_make_an_empty_library(words: Any) -> None:
    library = of([], words)
    assert len(library) == 0
    assert library.visible(None).shape == (0,)


def test_only_what_is_new_or_changed_is_encoded(words: Any, make_expert: MakeExpert) -> None:
    old = of([make_expert("a", "one"), make_expert("b", "two"), make_expert("c", "three")], words)
    words.batches.clear()
    changed = make_expert("b", "other samples, same adapter")
    new = of([make_expert("a", "one"), changed, make_expert("d", "four")], words, previous=old)
    assert words.batches == [["other samples, same adapter", "four"]]
    np.testing.assert_array_equal(new.prototypes[0], old.prototypes[0])


def test_stored_prototypes_are_used_unless_they_have_another_width(words: Any, make_expert: MakeExpert) -> None:
    a, b = make_expert("a", "one"), make_expert("b", "two")
    stored = {a.id: np.eye(2, words.dim, dtype=np.float32), b.id: np.eye(2, 7, dtype=np.float32)}
    library = of([a, b], words, stored=stored)
    np.testing.assert_array_equal(library.prototypes[0], stored[a.id])
    assert words.batches == [["two"]]


def test_rows_that_are_no_direction_are_left_out() -> None:
    rows = np.array([[3, 4], [0, 0], [np.nan, 1], [np.inf, 0]], np.float32)
    np.testing.assert_allclose(unit_rows(rows), [[0.6, 0.8]], atol=1e-7)


def test_two_experts_of_one_name_are_refused(words: Any, make_expert: MakeExpert) -> None:
    with pytest.raises(ValueError, match="distinct names"):
        of([make_expert("a", "one"), make_expert("a", "two", version=2)], words)


def test_a_private_expert_is_visible_to_its_owner_and_the_operator_only(words: Any, make_expert: MakeExpert) -> None:
    experts = [
        make_expert("anns", "one", owner="ann", visibility="private"),
        make_expert("bobs", "two", owner="bob", visibility="private"),
        make_expert("open", "three", owner="ann"),
    ]
    library = of(experts, words)
    assert library.visible("ann").tolist() == [True, False, True]
    assert library.visible("bob").tolist() == [False, True, True]
    assert library.visible("eve").tolist() == [False, False, True]
    assert library.visible("").tolist() == [False, False, True]
    assert library.visible(None).tolist() == [True, True, True]
    assert library.visible("ann", ["anns", "bobs", "nobody"]).tolist() == [True, False, False]
    assert library.visible(None, []).tolist() == [False, False, False]
