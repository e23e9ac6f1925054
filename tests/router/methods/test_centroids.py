from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.encoder import Vectors
from router.method import decide
from router.methods.centroids import Centroids, CentroidsSettings, count, spherical
from router.methods.retrieval import Retrieval, RetrievalSettings, centroid
from tests.router.methods.conftest import DIM, MakeExpert, ask, library_of, unit


def around(rng: np.random.Generator, n: int, towards: int | None = None) -> Vectors:
    """Directions anywhere, or near one axis."""
    rows = rng.standard_normal((n, DIM)) * (1 if towards is None else 0.1)
    if towards is not None:
        rows[:, towards] += 1
    return unit(rows)


def test_an_expert_of_two_things_is_found_by_either(make_expert: MakeExpert) -> None:
    rng = np.random.default_rng(0)
    both = np.concatenate([around(rng, 10, towards=0), around(rng, 10, towards=1)])
    between = around(rng, 20) * 0 + np.float32(np.sqrt(0.5)) * np.eye(DIM, dtype=np.float32)[[0]]
    between[:, 2] = np.sqrt(0.5)  # half way from the first thing to something else
    library = library_of(make_expert, {"between": between, "both": both})
    prompt = around(np.random.default_rng(1), 1, towards=0)[0]
    several = Centroids.fit(library, CentroidsSettings(clusters=2))
    assert decide("x", several, library, ask(library, prompt)).experts[0].expert == "both"
    assert several.score(ask(library, prompt))[1] > 0.9
    assert Retrieval.fit(library, RetrievalSettings()).score(ask(library, prompt))[1] < 0.8


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 24), m=st.integers(1, 4), seed=st.integers(0, 99))
def test_the_score_is_the_best_cosine_with_centroids_that_are_means_of_their_nearest(n: int, m: int, seed: int) -> None:
    """The slow twin: at k-means' end every sample belongs to its nearest centroid, and each centroid is their mean."""
    samples = around(np.random.default_rng(seed), n)
    found = spherical(samples, m)
    assert 1 <= len(found) <= m
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    if m == 1:
        np.testing.assert_allclose(found, centroid(samples), atol=1e-6)
    np.testing.assert_array_equal(found, spherical(samples, m))  # and the same every time


@pytest.mark.parametrize(("n", "expected"), [(0, 1), (1, 1), (9, 1), (10, 2), (20, 3), (100, 3)])
def test_few_samples_have_few_centroids(n: int, expected: int) -> None:
    assert count(np.zeros((n, DIM), np.float32), CentroidsSettings()) == expected


def test_scores_are_those_of_a_loop_over_centroids(make_expert: MakeExpert) -> None:
    rng = np.random.default_rng(3)
    groups = {name: around(rng, n) for name, n in (("a", 20), ("b", 1), ("c", 12), ("d", 0))}
    library = library_of(make_expert, groups)
    method = Centroids.fit(library, CentroidsSettings())
    for vector in around(rng, 5):
        slow = [
            max((float(c @ vector) for c in spherical(group, count(group, CentroidsSettings()))), default=-np.inf)
            for group in groups.values()
        ]
        np.testing.assert_allclose(method.score(ask(library, vector)), slow, atol=2e-6)


def test_equal_samples_have_one_centroid() -> None:
    same = np.repeat(around(np.random.default_rng(0), 1), 20, axis=0)
    assert spherical(same, 3).shape == (1, DIM)


def test_only_new_experts_are_clustered_again(make_expert: MakeExpert) -> None:
    rng = np.random.default_rng(5)
    groups = {"a": around(rng, 20), "b": around(rng, 20)}
    first = Centroids.fit(library_of(make_expert, groups), CentroidsSettings())
    library = library_of(make_expert, {**groups, "c": around(rng, 20)})
    second = Centroids.fit(library, CentroidsSettings(), first)
    assert all(second.made[key] is first.made[key] for key in first.made)
    fresh = Centroids.fit(library, CentroidsSettings())
    for vector in around(rng, 3):
        np.testing.assert_array_equal(second.score(ask(library, vector)), fresh.score(ask(library, vector)))


def test_a_prompt_unlike_everything_goes_to_the_base_model(make_expert: MakeExpert) -> None:
    rng = np.random.default_rng(6)
    library = library_of(make_expert, {"a": around(rng, 20, towards=0), "b": around(rng, 20, towards=1)})
    method = Centroids.fit(library, CentroidsSettings())
    assert decide("x", method, library, ask(library, around(rng, 1, towards=4)[0])).kind == "base"
    never = Centroids.fit(library, CentroidsSettings(threshold=-1))
    assert decide("x", never, library, ask(library, around(rng, 1, towards=4)[0])).kind == "select"


def test_a_library_without_experts_is_fine(make_expert: MakeExpert) -> None:
    library = library_of(make_expert, {})
    method = Centroids.fit(library, CentroidsSettings())
    assert decide("x", method, library, ask(library, around(np.random.default_rng(0), 1)[0])).kind == "base"
