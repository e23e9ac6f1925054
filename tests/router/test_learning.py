"""Learning from feedback: what is taught, and when it is promoted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from adapters_registry.expert import Expert
from adapters_registry.feedback import Decided
from router import library as libraries
from router.learning import (
    FEWEST,
    FOLDS,
    MOST,
    Judged,
    Trial,
    _comparison,
    compare,
    fresh,
    judged,
    taught,
)
from router.methods.retrieval import Retrieval, RetrievalSettings
from router.versions import NOTHING, Content, Learned, Rating

MakeExpert = Callable[..., Expert]
ENCODER = "words@1/1000"


def decided(name: str = "dec-1", vector: Any = (1.0, 0.0), **fields: Any) -> Decided:
    given: dict[str, Any] = {
        "at": datetime.now(UTC),
        "tenant": None,
        "method": "retrieval",
        "kind": "select",
        "experts": [{"expert": "a", "id": "a@1", "weight": 1.0}],
        "candidates": [],
        "confidence": 0.5,
        "router": 0,
        "encoder": ENCODER,
        "score": 1.0,
    }
    return Decided(id=name, vector=np.array(vector, np.float32), **{**given, **fields})


def said(name: str, expert: str, score: float, vector: Any, text: str | None = None) -> Judged:
    return Judged(Rating(decision=name, expert=expert, score=score, text=text), np.asarray(vector, np.float32), None)


# What is learned from


def refuse(texts: Sequence[str]) -> Any:
    raise AssertionError("nothing needs to be encoded")


def test_an_answer_of_one_expert_is_its_own() -> None:
    (found,) = judged([decided(text="spell it")], ENCODER, refuse)
    assert found.rating == Rating(decision="dec-1", expert="a", score=1.0, text="spell it")
    assert found.vector.tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("weights", "score", "whose"),
    [((0.7, 0.3), 1.0, "a"), ((0.3, 0.7), 1.0, "b"), ((0.5, 0.5), 1.0, None), ((0.7, 0.3), 0.0, None)],
)
def test_of_several_experts_the_largest_is_praised_and_none_blamed(
    weights: Sequence[float], score: float, whose: str | None
) -> None:
    experts = [{"expert": name, "id": name, "weight": weight} for name, weight in zip("ab", weights, strict=True)]
    found = judged([decided(kind="blend", experts=experts, score=score)], ENCODER, refuse)
    assert [each.rating.expert for each in found] == ([whose] if whose else [])


def test_what_says_nothing_about_an_expert_is_left_out() -> None:
    useless = [
        decided("base", kind="base", experts=[]),
        decided("unjudged", score=None),
        decided("no vector", vector=()),
        decided("another encoder", encoder="other"),
        decided("not finite", vector=(np.nan, 1.0)),
    ]
    assert judged(useless, ENCODER, refuse) == []


def test_with_its_text_a_prompt_outlives_the_encoder(words: Any) -> None:
    (found,) = judged([decided(text="one two", encoder="other")], ENCODER, words.encode)
    np.testing.assert_array_equal(found.vector, words.encode(["one two"])[0])


# What is new, and what is taught


def known(*ratings: Rating, encoder: str = ENCODER) -> Learned:
    content = Content(number=3, created_at=datetime.now(UTC), ratings=ratings, encoder=encoder)
    return Learned(content, np.eye(len(ratings), 2, dtype=np.float32))


def test_only_what_the_version_in_force_does_not_know_is_new() -> None:
    old = known(Rating(decision="1", expert="a", score=1), Rating(decision="2", expert="a", score=1))
    new = [
        said("1", "a", 1, (1, 0)),
        said("2", "a", 0, (0, 1)),
        said("3", "a", 1, (1, 0)),
        said("4", "a", 0.5, (1, 0)),
    ]
    assert [each.rating.decision for each in fresh(old, new)] == ["2", "3"]


def test_the_last_word_on_a_decision_counts_and_neutral_ones_take_it_back() -> None:
    old = known(Rating(decision="1", expert="a", score=1), Rating(decision="2", expert="a", score=1))
    learned = taught(old, [said("1", "a", 0, (0, 1)), said("2", "a", 0.5, (1, 0))], ENCODER, refuse)
    assert [(each.decision, each.score) for each in learned.content.ratings] == [("1", 0)]
    assert learned.vectors.tolist() == [[0, 1]]


def test_an_expert_learns_from_the_latest_prompts_only() -> None:
    new = [said(f"{k}", "a", k % 2, (1, 0)) for k in range(2 * MOST + 20)] + [said("b", "b", 1, (0, 1))]
    ratings = taught(NOTHING, new, ENCODER, refuse).content.ratings
    assert [each.decision for each in ratings] == [f"{k}" for k in range(20, 2 * MOST + 20)] + ["b"]


def test_of_a_version_by_another_encoder_texts_are_kept_and_vectors_are_not(words: Any) -> None:
    old = known(
        Rating(decision="1", expert="a", score=1, text="one"),
        Rating(decision="2", expert="a", score=1),
        encoder="other",
    )
    learned = taught(old, [], ENCODER, words.encode)
    assert [each.decision for each in learned.content.ratings] == ["1"]
    np.testing.assert_array_equal(learned.vectors, words.encode(["one"]))


# Old against new


@pytest.fixture
def trial(words: Any, make_expert: MakeExpert) -> Trial:
    """Two experts with ten samples each: `a` is about spelling, `b` about cities."""
    things = ["cat", "dog", "sun", "map", "car", "pen", "cup", "hat", "box", "key"]
    experts = [
        make_expert("a", *(f"spell the word {thing}" for thing in things)),
        make_expert("b", *(f"which city has a {thing}" for thing in things)),
    ]
    library = libraries.build(experts, words.encode, words.dim)
    return Trial("retrieval", Retrieval, RetrievalSettings(threshold=-1), library, ENCODER, words.encode)


def prompts(start: str) -> list[str]:
    return [f"{start} {number:b}" for number in range(12)]


def test_a_version_that_heeds_held_out_judgements_and_keeps_the_samples_is_better(trial: Trial) -> None:
    texts = prompts("spell the year backwards in french")
    new = [said(text, "a", 0.0, trial.embed([text])[0]) for text in texts]
    report = compare(trial, new)
    assert report.better, report.why
    assert (report.good, report.bad) == (0, 12)
    assert (report.feedback.prompts, report.feedback.old) == (12, 0)
    assert report.feedback.new > 0.8
    assert report.feedback.low > 0
    assert report.samples.prompts == 20
    assert report.samples.old == report.samples.new == 1


def test_blame_that_would_cost_an_expert_its_own_prompts_is_not_heeded(trial: Trial) -> None:
    texts = [text.replace("word ", "word the ") for text in trial.library.texts[0]] * 2
    new = [said(f"{k}", "a", 0.0, trial.embed([text])[0]) for k, text in enumerate(texts)]
    report = compare(trial, new)
    assert not report.better
    assert "of the held-out samples" in report.why


def test_what_changes_nothing_is_not_better(trial: Trial) -> None:
    report = compare(trial, [said(text, "a", 1.0, trial.embed([text])[0]) for text in prompts("spell the word")])
    assert not report.better
    assert "no better" in report.why
    assert report.feedback.old == report.feedback.new == 1


def test_too_little_feedback_is_never_enough(trial: Trial) -> None:
    texts = prompts("spell the year backwards in french")[: FEWEST - 1]
    report = compare(trial, [said(text, "a", 0.0, trial.embed([text])[0]) for text in texts])
    assert report.why == "9 new judgements say too little; 10 are needed"


def test_a_prompt_is_never_asked_of_a_version_that_was_taught_it(trial: Trial) -> None:
    vector = trial.embed(["spell the year backwards in french"])[0]
    report = compare(trial, [said(f"{k}", "a", 0.0, vector) for k in range(20)])
    assert report.feedback.new == report.feedback.old == 0, "twenty times the same prompt is one prompt"


def test_progress_is_told_fold_by_fold(trial: Trial) -> None:
    told: list[tuple[int, int]] = []
    compare(trial, [], lambda done, of: told.append((done, of)))
    assert told == [(k + 1, FOLDS) for k in range(FOLDS)]


def test_the_interval_of_a_difference_is_that_of_a_loop_over_resamples() -> None:
    rng = np.random.default_rng(1)
    old, new = rng.random(200) < 0.5, rng.random(200) < 0.6
    found = _comparison(list(zip(old.tolist(), new.tolist(), strict=True)))
    differences = new.astype(float) - old
    means = [rng.choice(differences, 200).mean() for _ in range(4000)]
    assert found.difference == pytest.approx(differences.mean())
    assert (found.low, found.high) == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.02)
