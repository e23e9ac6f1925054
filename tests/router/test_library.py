from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from adapters_registry.expert import Expert
from router.library import Library, build, unit_rows
from router.versions import Content, Learned, Rating

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


def learned(*ratings: Rating, rows: Any = None) -> Learned:
    vectors = np.eye(len(ratings), 32, dtype=np.float32) if rows is None else rows
    content = Content(number=1, created_at=datetime.now(UTC), ratings=ratings, encoder="words@1/1000")
    return Learned(content, vectors)


def test_what_was_learned_stands_behind_what_was_registered(words: Any, make_expert: MakeExpert) -> None:
    known = learned(
        Rating(decision="1", expert="a", score=1, text="five six"),
        Rating(decision="2", expert="a", score=0.9),
        Rating(decision="3", expert="b", score=0.1),
        Rating(decision="4", expert="gone", score=1, text="nobody's"),
    )
    library = of([make_expert("a", "one"), make_expert("b", "two")], words, learned=known, encoder="words@1/1000")
    assert library.texts == (("one", "five six"), ("two",))
    expected = [*words.encode(["one", "five six"]), known.vectors[1]]
    np.testing.assert_allclose(library.prototypes[0], expected, atol=1e-6)
    np.testing.assert_allclose(library.registered[0], words.encode(["one"]), atol=1e-6)
    np.testing.assert_array_equal(library.refused[1], known.vectors[2:3])
    assert [len(rows) for rows in library.refused] == [0, 1]


def test_learning_encodes_only_the_new_prompts_and_forgetting_none(words: Any, make_expert: MakeExpert) -> None:
    experts = [make_expert("a", "one"), make_expert("b", "two")]
    old = of(experts, words)
    words.batches.clear()
    known = learned(Rating(decision="1", expert="a", score=1, text="five six"))
    new = of(experts, words, previous=old, learned=known, encoder="words@1/1000")
    back = of(experts, words, previous=new)
    assert words.batches == [["five six"], []]
    assert (new.keys[0] == old.keys[0], new.keys[1] == old.keys[1]) == (False, True)
    assert back.keys == old.keys
    assert [len(rows) for rows in back.prototypes] == [1, 1]


def test_vectors_of_another_encoder_are_left_out(words: Any, make_expert: MakeExpert) -> None:
    known = learned(Rating(decision="2", expert="a", score=0.9), Rating(decision="3", expert="a", score=0))
    library = of([make_expert("a", "one")], words, learned=known, encoder="other/1000")
    assert [len(rows) for rows in (*library.prototypes, *library.refused)] == [1, 0]
