from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from adapters_registry.expert import Expert
from router.encoder import Vectors
from router.library import Library, build
from router.method import Query, Scores, decide
from router.methods.retrieval import (
    LONE_COHESION,
    THRESHOLDS,
    Retrieval,
    RetrievalSettings,
    Scoring,
    centroid,
    cohesion,
)

MakeExpert = Callable[..., Expert]
DIM = 6
SCORINGS: list[Scoring] = ["centroid", "best", "vote"]
scorings = pytest.mark.parametrize("scoring", SCORINGS)


def by_numpy(prototypes: list[Vectors], q: Vectors, scoring: Scoring, k: int) -> Scores:
    """The slow twin: the paper's formulas, one expert at a time."""
    if scoring == "best":
        return np.array([max((p @ q).tolist(), default=-np.inf) for p in prototypes])
    if scoring == "centroid":
        sums = [p.sum(axis=0) for p in prototypes]
        return np.array([s @ q / np.linalg.norm(s) if np.linalg.norm(s) > 1e-6 else -np.inf for s in sums])
    votes = sorted(((float(e @ q), n) for n, p in enumerate(prototypes) for e in p), reverse=True)[:k]
    scores = np.full(len(prototypes), -np.inf)
    for cosine, n in votes:
        scores[n] = cosine / len(votes) + (scores[n] if np.isfinite(scores[n]) else 0)
    return scores


def unit(rng: np.random.Generator, n: int) -> Vectors:
    vectors = rng.standard_normal((n, DIM))
    rows: Vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return rows


def library_of(make_expert: MakeExpert, prototypes: dict[str, Vectors]) -> Library:
    experts = [make_expert(name, "a sample") for name in prototypes]
    stored = {expert.id: prototypes[expert.name] for expert in experts}
    return build(experts, lambda texts: np.zeros((0, DIM), np.float32), DIM, stored=stored)


def fit(library: Library, previous: Retrieval | None = None, **options: Any) -> Retrieval:
    return Retrieval.fit(library, RetrievalSettings(**options), previous)


def query(library: Library, vector: Vectors, among: list[bool] | None = None) -> Query:
    return Query("text", vector, np.ones(len(library), bool) if among is None else np.array(among, bool))


worlds = st.tuples(st.lists(st.integers(0, 5), max_size=8), st.integers(0, 2**32 - 1))


@scorings
@given(world=worlds, k=st.integers(1, 30))
@settings(deadline=None)
def test_scores_are_those_of_the_formula(
    make_expert: MakeExpert, scoring: Scoring, world: tuple[list[int], int], k: int
) -> None:
    rng = np.random.default_rng(world[1])
    prototypes = [unit(rng, n) for n in world[0]]
    library = library_of(make_expert, {f"e{n}": p for n, p in enumerate(prototypes)})
    q = unit(rng, 1)[0]
    scores = fit(library, scoring=scoring, k=k).score(query(library, q))
    np.testing.assert_allclose(scores, by_numpy(prototypes, q, scoring, k), atol=2e-6)


@scorings
@given(world=worlds)
@settings(deadline=None)
def test_the_order_of_samples_and_experts_and_the_length_of_vectors_do_not_matter(
    make_expert: MakeExpert, scoring: Scoring, world: tuple[list[int], int]
) -> None:
    rng = np.random.default_rng(world[1])
    prototypes = {f"e{n}": unit(rng, size) for n, size in enumerate(world[0])}
    shuffled = {
        name: (rng.permutation(prototypes[name]) * rng.uniform(0.1, 9, (len(prototypes[name]), 1))).astype(np.float32)
        for name in rng.permutation(list(prototypes)).tolist()
    }
    q = unit(rng, 1)[0]
    a, b = library_of(make_expert, prototypes), library_of(make_expert, shuffled)
    np.testing.assert_allclose(
        fit(a, scoring=scoring).score(query(a, q)), fit(b, scoring=scoring).score(query(b, q)), atol=3e-6
    )
    one, other = (np.asarray(fit(each, scoring=scoring).thresholds, float) for each in (a, b))
    np.testing.assert_allclose(one, other, atol=1e-5)


@scorings
@given(world=worlds)
@settings(deadline=None)
def test_a_hidden_expert_counts_as_if_it_were_not_there(
    make_expert: MakeExpert, scoring: Scoring, world: tuple[list[int], int]
) -> None:
    rng = np.random.default_rng(world[1])
    prototypes = {f"e{n}": unit(rng, size) for n, size in enumerate(world[0])}
    seen = {name: p for name, p in prototypes.items() if rng.random() < 0.5}
    q = unit(rng, 1)[0]
    whole, part = library_of(make_expert, prototypes), library_of(make_expert, seen)
    masked = fit(whole, scoring=scoring).score(query(whole, q, [name in seen for name in prototypes]))
    for name, score in zip(prototypes, masked.tolist(), strict=True):
        assert name in seen or score == -np.inf
    alone = fit(part, scoring=scoring).score(query(part, q))
    np.testing.assert_allclose([masked[list(prototypes).index(name)] for name in seen], alone, atol=2e-6)


@scorings
def test_experts_with_the_same_samples_tie_and_the_first_name_wins(make_expert: MakeExpert, scoring: Scoring) -> None:
    rng = np.random.default_rng(0)
    for others in range(12):  # faiss takes vectors in blocks: the place in a block must not decide
        same = unit(rng, 1) + 0.01 * unit(rng, 3)
        prototypes = {f"x{n}": unit(rng, 3) for n in range(others)} | {"twin-b": same, "twin-a": same}
        library = library_of(make_expert, prototypes)
        q = same.sum(axis=0) / np.linalg.norm(same.sum(axis=0))
        decision = decide("retrieval", fit(library, scoring=scoring), library, query(library, q))
        assert [each.expert for each in decision.candidates[:2]] == ["twin-a", "twin-b"]


@scorings
def test_nothing_to_retrieve_is_answered_by_the_base_model(make_expert: MakeExpert, scoring: Scoring) -> None:
    q = unit(np.random.default_rng(0), 1)[0]
    for prototypes in ({}, {"empty": np.zeros((0, DIM), np.float32)}):
        library = library_of(make_expert, prototypes)
        assert decide("retrieval", fit(library, scoring=scoring), library, query(library, q)).kind == "base"


def test_samples_that_cancel_out_have_no_centroid() -> None:
    assert centroid(np.array([[1, 0], [-1, 0]], np.float32)).shape == (0, 2)


@scorings
def test_a_refit_updates_the_index_in_place_while_the_old_method_still_answers(
    make_expert: MakeExpert, scoring: Scoring
) -> None:
    rng = np.random.default_rng(3)
    first = {name: unit(rng, 4) for name in ("a", "b", "c")}
    second = {"a": first["a"], "c": unit(rng, 5), "d": unit(rng, 2)}
    third = {"d": second["d"]}
    q = unit(rng, 1)[0]
    libraries = [library_of(make_expert, first), library_of(make_expert, third)]
    # c keeps its name and adapter and gets other samples: its key must change with its texts
    experts = [make_expert(name, "other samples" if name == "c" else "a sample") for name in second]
    stored = {expert.id: second[expert.name] for expert in experts}
    libraries.insert(1, build(experts, lambda texts: np.zeros((0, DIM), np.float32), DIM, stored=stored))

    methods: list[Retrieval] = []
    for library in libraries:
        before = [m.score(query(lib, q)) for m, lib in zip(methods[-1:], libraries[len(methods) - 1 :], strict=False)]
        methods.append(fit(library, methods[-1] if methods else None, scoring=scoring))
        np.testing.assert_array_equal(
            methods[-1].score(query(library, q)), fit(library, scoring=scoring).score(query(library, q))
        )
        for scores in before:
            old = libraries[len(methods) - 2]
            np.testing.assert_array_equal(methods[-2].score(query(old, q)), scores)
    assert methods[0].index is methods[2].index
    assert fit(libraries[2], methods[2], scoring=scoring).index.keys() == libraries[2].keys


def test_every_expert_has_a_threshold_that_grows_with_the_likeness_of_its_samples(make_expert: MakeExpert) -> None:
    rng = np.random.default_rng(4)
    base = unit(rng, 1)
    alike = base + 0.05 * unit(rng, 6)
    library = library_of(make_expert, {"alike": alike, "loose": unit(rng, 6), "one": base})
    for scoring in ("centroid", "best"):
        thresholds = fit(library, scoring=scoring).thresholds
        assert thresholds is not None
        assert thresholds[0] > thresholds[1]
        offset, slope = THRESHOLDS[scoring]
        assert thresholds[2] == pytest.approx(offset + slope * LONE_COHESION)


@pytest.mark.parametrize("scoring", ["centroid", "best"])
def test_cohesion_is_the_mean_score_of_a_held_out_sample(scoring: Scoring) -> None:
    samples = unit(np.random.default_rng(5), 7)
    held_out = [by_numpy([np.delete(samples, n, axis=0)], samples[n], scoring, 20)[0] for n in range(len(samples))]
    assert cohesion(samples, scoring) == pytest.approx(np.mean(held_out), abs=1e-6)


def test_a_given_threshold_holds_for_every_expert(make_expert: MakeExpert) -> None:
    library = library_of(make_expert, {"a": unit(np.random.default_rng(6), 3), "b": unit(np.random.default_rng(7), 3)})
    assert np.asarray(fit(library, threshold=0.7).thresholds).tolist() == [0.7, 0.7]


@pytest.mark.parametrize("wrong", [{"scoring": "mean"}, {"k": 0}, {"threshold": 2}, {"unknown": 1}])
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RetrievalSettings.model_validate(wrong)
