from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.encoder import Vectors
from router.method import Query, Scores, decide
from router.methods.knn import KNN, KNNSettings
from router.methods.retrieval import Retrieval, RetrievalSettings
from tests.router.methods.conftest import DIM, MakeExpert, ask, library_of, unit


def around(rng: np.random.Generator, n: int) -> Vectors:
    """Directions anywhere."""
    return unit(rng.standard_normal((n, DIM)))


def by_loop(groups: list[Vectors], q: Vectors, K: int, b: float) -> Scores:
    """The slow twin: the formula, one neighbour at a time."""
    near = sorted(((float(e @ q), k) for k, group in enumerate(groups) for e in group), reverse=True)[:K]
    votes = [sum(np.exp(cosine / b) for cosine, k in near if k == expert) for expert in range(len(groups))]
    return np.array([b * np.log(vote / K) if vote else -np.inf for vote in votes])


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 8), min_size=1, max_size=5),
    K=st.integers(1, 30),
    b=st.sampled_from([0.02, 0.1, 1.0]),
    seed=st.integers(0, 999),
)
def test_scores_are_the_formula_s(make_expert: MakeExpert, sizes: list[int], K: int, b: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    groups = {f"e{k}": around(rng, n) for k, n in enumerate(sizes)}
    library = library_of(make_expert, groups)
    q = around(rng, 1)[0]
    method = KNN.fit(library, KNNSettings(neighbours=K, bandwidth=b))
    np.testing.assert_allclose(method.score(ask(library, q)), by_loop(list(groups.values()), q, K, b), atol=1e-5)


def test_of_many_farther_and_few_nearer_votes_the_bandwidth_decides(make_expert: MakeExpert) -> None:
    q = np.eye(DIM, dtype=np.float32)[0]
    near, far = (np.sqrt(1 - c * c) * np.eye(DIM)[1] + c * np.eye(DIM)[0] for c in (0.9, 0.8))
    groups = {"many": np.tile(far, (9, 1)).astype(np.float32), "near": near[None].astype(np.float32)}
    library = library_of(make_expert, groups)
    wide, narrow = (KNN.fit(library, KNNSettings(bandwidth=b, threshold=-9)) for b in (0.5, 0.01))
    assert decide("x", wide, library, ask(library, q)).experts[0].expert == "many"
    assert decide("x", narrow, library, ask(library, q)).experts[0].expert == "near"


def test_with_one_neighbour_it_is_the_nearest_sample(make_expert: MakeExpert) -> None:
    rng = np.random.default_rng(0)
    library = library_of(make_expert, {"a": around(rng, 8), "b": around(rng, 8)})
    nearest = Retrieval.fit(library, RetrievalSettings(scoring="best", threshold=-1))
    one = KNN.fit(library, KNNSettings(neighbours=1, threshold=-1))
    for q in around(rng, 10):
        mine, theirs = one.score(ask(library, q)), nearest.score(ask(library, q))
        assert int(mine.argmax()) == int(theirs.argmax())
        assert mine.max() == pytest.approx(theirs.max(), abs=1e-5)


def test_samples_of_experts_that_may_not_answer_do_not_vote(make_expert: MakeExpert) -> None:
    rng = np.random.default_rng(1)
    groups = {"a": around(rng, 8), "b": around(rng, 8)}
    library = library_of(make_expert, groups)
    q = around(rng, 1)[0]
    settings_ = KNNSettings(neighbours=4)
    alone = KNN.fit(library_of(make_expert, {"b": groups["b"]}), settings_).score(Query("", q, np.ones(1, bool)))
    masked = KNN.fit(library, settings_).score(Query("", q, np.array([False, True])))
    assert masked[0] == -np.inf
    assert masked[1] == alone[0]


def test_a_library_without_experts_is_fine(make_expert: MakeExpert) -> None:
    library = library_of(make_expert, {})
    method = KNN.fit(library, KNNSettings())
    assert decide("x", method, library, ask(library, around(np.random.default_rng(0), 1)[0])).kind == "base"
