from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Self

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_registry.expert import Expert
from router.decision import Decision
from router.library import Library, build, unit_rows
from router.method import Choice, Method, MethodSettings, Query, Scores, confidence, decide, standing
from router.methods.base import Base
from router.methods.retrieval import Retrieval, RetrievalSettings
from router.versions import Content, Learned, Rating

MakeExpert = Callable[..., Expert]


class Fixed(Method):
    """Scores that a test decides."""

    taxonomy = Base.taxonomy

    def __init__(self, scores: list[float], thresholds: list[float] | None = None) -> None:
        self._scores = np.array(scores)
        self.thresholds = None if thresholds is None else np.array(thresholds)

    @classmethod
    def fit(cls, library: Library, settings: MethodSettings, previous: Self | None = None) -> Self:
        return cls([0.0] * len(library))

    def score(self, query: Query) -> Scores:
        return self._scores


class Pair(Fixed):
    """What a blend looks like: the best two, by their share."""

    def choose(self, query: Query, scores: Scores, ranked: Any) -> Choice:
        best = scores[ranked[:2]]
        return Choice(list(zip(ranked[:2], (best / best.sum()).tolist(), strict=True)), kind="blend")


@pytest.fixture
def library(words: Any, make_expert: MakeExpert) -> Library:
    experts = [make_expert(name, name) for name in ("a", "b", "c")]
    return build(experts, words.encode, words.dim, generation=4)


def of(method: Method, library: Library, among: list[bool] | None = None, limit: int | None = None) -> Decision:
    mask = np.ones(len(library), bool) if among is None else np.array(among)
    return decide("fixed", method, library, Query("text", np.zeros(library.dim, np.float32), mask), limit)


def test_the_best_score_is_selected_and_every_candidate_listed_best_first(library: Library) -> None:
    decision = of(Fixed([0.1, 0.9, 0.5]), library)
    assert decision.kind == "select"
    assert [(each.expert, each.id, each.weight) for each in decision.experts] == [("b", library.experts[1].id, 1.0)]
    assert [(each.expert, each.score) for each in decision.candidates] == [("b", 0.9), ("c", 0.5), ("a", 0.1)]
    assert decision.generation == 4
    assert decision.threshold is None


def test_the_list_of_candidates_can_be_limited(library: Library) -> None:
    assert [each.expert for each in of(Fixed([0.1, 0.9, 0.5]), library, limit=2).candidates] == ["b", "c"]


def test_ties_go_to_the_first_name(library: Library) -> None:
    decision = of(Fixed([0.5, 0.9, 0.9]), library)
    assert decision.experts[0].expert == "b"
    assert [each.expert for each in decision.candidates] == ["b", "c", "a"]


def test_experts_outside_the_mask_are_neither_chosen_nor_named(library: Library) -> None:
    decision = of(Fixed([0.1, 0.9, 0.5]), library, [True, False, True])
    assert decision.experts[0].expert == "c"
    assert "b" not in {each.expert for each in decision.candidates}
    hidden = of(Fixed([0.1, -np.inf, 0.5]), library)
    assert decision.confidence == hidden.confidence


def test_under_its_own_threshold_the_best_expert_does_not_answer(library: Library) -> None:
    decision = of(Fixed([0.1, 0.4, 0.3], [0.0, 0.5, 0.2]), library)
    assert (decision.kind, decision.experts, decision.threshold) == ("base", (), 0.5)
    assert decision.reason == "best score 0.400 is under the threshold 0.500"
    assert decision.candidates[0].expert == "b"
    assert of(Fixed([0.1, 0.5, 0.3], [0.0, 0.5, 0.2]), library).kind == "select"


def test_scores_that_are_no_numbers_do_not_count(library: Library) -> None:
    decision = of(Fixed([np.nan, 0.2, np.inf]), library)
    assert decision.experts[0].expert == "b"
    assert len(decision.candidates) == 1
    assert of(Fixed([np.nan] * 3), library).reason == "no expert could be scored"


def test_an_embedding_that_is_not_finite_goes_to_the_base_model(library: Library) -> None:
    vector = np.full(library.dim, np.nan, np.float32)
    decision = decide("fixed", Fixed([1, 2, 3]), library, Query("text", vector, np.ones(3, bool)))
    assert (decision.kind, decision.confidence) == ("base", 1.0)
    assert decision.reason == "the prompt's embedding is not finite"


def test_without_an_available_expert_the_base_model_answers(library: Library) -> None:
    assert of(Fixed([1, 2, 3]), library, [False] * 3).reason == "no expert is available"


def test_a_method_may_choose_several_experts_with_weights(library: Library) -> None:
    decision = of(Pair([0.2, 0.6, 0.1]), library)
    assert decision.kind == "blend"
    assert [each.expert for each in decision.experts] == ["b", "a"]
    assert sum(each.weight for each in decision.experts) == pytest.approx(1)


SCORES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8).map(np.array)


@given(SCORES, st.floats(1e-3, 10))
def test_confidence_is_a_probability_of_at_least_an_even_share(scores: Scores, temperature: float) -> None:
    assert 1 / len(scores) - 1e-12 <= confidence(scores, temperature) <= 1


@given(SCORES, st.floats(-1, 1), st.floats(1e-2, 10))
def test_neither_a_shift_nor_the_order_of_scores_changes_confidence(
    scores: Scores, shift: float, temperature: float
) -> None:
    small = scores / 1e6
    before = confidence(small, temperature)
    assert confidence(small[::-1] + shift, temperature) == pytest.approx(before, abs=1e-6)


def test_at_the_threshold_expert_and_base_model_are_equally_probable(library: Library) -> None:
    alone = [True, False, False]
    assert of(Fixed([0.3, 0, 0], [0.3, 0, 0]), library, alone).confidence == pytest.approx(0.5)
    assert of(Fixed([0.3, 0, 0]), library, alone).confidence == 1
    unsure = of(Fixed([0.2, 0, 0], [0.3, 0, 0]), library, alone)
    sure = of(Fixed([-0.2, 0, 0], [0.3, 0, 0]), library, alone)
    assert unsure.kind == sure.kind == "base"
    assert 0.5 < unsure.confidence < sure.confidence < 1


def test_an_expert_is_passed_over_for_prompts_like_those_it_answered_badly(words: Any, make_expert: MakeExpert) -> None:
    experts = [make_expert("a", "spell the word cat", "spell the word dog"), make_expert("b", "name a city in peru")]
    bad = words.encode(["spell the year out"])
    content = Content(
        number=1,
        created_at=datetime.now(UTC),
        ratings=(Rating(decision="1", expert="a", score=0.0),),
        encoder="words",
    )
    library = build(experts, words.encode, words.dim, learned=Learned(content, bad), encoder="words")
    method = Retrieval.fit(library, RetrievalSettings(threshold=-1))

    def route(text: str) -> Decision:
        return decide("retrieval", method, library, Query(text, words.encode([text])[0], np.ones(2, bool)))

    spoiled = route("spell the year out")
    assert [each.expert for each in spoiled.experts] == ["b"]
    assert spoiled.reason == "a was passed over: it answered a prompt badly that is nearer than its own"
    assert [each.expert for each in spoiled.candidates] == ["b"]
    assert [each.expert for each in route("spell the word cat").experts] == ["a"], "its own prompts stay its own"


def test_a_method_tells_how_its_scores_stand(library: Library) -> None:
    assert standing(Fixed([0, 0, 0], [0.1, 0.2, 0.3]), library).thresholds == {"a": 0.1, "b": 0.2, "c": 0.3}
    assert standing(Fixed([0, 0, 0]), library).thresholds == {}


def test_whoever_is_spoiled_is_what_a_loop_over_all_vectors_says(make_expert: MakeExpert) -> None:
    rng = np.random.default_rng(0)
    rows = [unit_rows(rng.standard_normal((n, 4)).astype(np.float32)) for n in (3, 1, 0, 2)]
    refused = [unit_rows(rng.standard_normal((n, 4)).astype(np.float32)) for n in (2, 0, 1, 3)]
    experts = tuple(make_expert(name, name) for name in "abcd")
    library = Library(experts, ((),) * 4, tuple(rows), tuple("abcd"), 4, refused=tuple(refused))
    for vector in unit_rows(rng.standard_normal((50, 4)).astype(np.float32)):
        slow = [
            max((float(r @ vector) for r in bad), default=-2) > max((float(r @ vector) for r in good), default=-1) + 0.1
            for good, bad in zip(rows, refused, strict=True)
        ]
        assert library.spoiled(vector).tolist() == slow
