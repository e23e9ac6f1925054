from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from adapters_registry.expert import Expert
from router.conformal import softmax
from router.library import Library, build, unit_rows
from router.method import Choice, Query, decide
from router.methods.bandit import Arm, Bandit, BanditSettings, directions, explored
from router.methods.retrieval import Retrieval, RetrievalSettings
from router.versions import Content, Learned, Rating

MakeExpert = Callable[..., Expert]
DIM, ENCODER = 8, "e"
EXPERTS = ("a", "b", "c", "d")


@pytest.fixture
def prototypes() -> dict[str, Any]:
    """Five samples around one direction for each expert."""
    rng = np.random.default_rng(0)
    return {
        name: unit_rows((np.eye(DIM)[k] + 0.2 * rng.standard_normal((5, DIM))).astype(np.float32))
        for k, name in enumerate(EXPERTS)
    }


@pytest.fixture
def library(make_expert: MakeExpert, prototypes: dict[str, Any]) -> Callable[..., Library]:
    def make(ratings: list[Rating] | None = None, vectors: Any = None, encoder: str = ENCODER) -> Library:
        experts = [make_expert(name, *("a sample",) * 5) for name in EXPERTS]
        stored = {expert.id: prototypes[expert.name] for expert in experts}
        content = Content(number=1, created_at=datetime.now(UTC), ratings=tuple(ratings or ()), encoder=encoder)
        learned = Learned(content, np.zeros((0, DIM), np.float32) if vectors is None else vectors)
        nothing = np.zeros((0, DIM), np.float32)
        return build(experts, lambda texts: nothing, DIM, stored=stored, learned=learned, encoder=ENCODER)

    return make


def ask(library: Library, vector: Any, text: str = "a prompt") -> Query:
    return Query(text, vector, np.ones(len(library), bool))


def chosen(method: Bandit, library: Library, vector: Any, text: str = "") -> Choice:
    query = ask(library, vector, text)
    scores = method.score(query)
    return method.choose(query, scores, np.argsort(-scores).tolist())


# The formulas


def test_an_arm_is_ridge_regression() -> None:
    """Against the normal equations, summed one answer at a time, and against the minimum they belong to."""
    rng = np.random.default_rng(1)
    phi, rewards, ridge = rng.standard_normal((7, 3)), rng.standard_normal(7), 0.7
    A, b = ridge * np.eye(3), np.zeros(3)
    for x, r in zip(phi, rewards, strict=True):
        A, b = A + np.outer(x, x), b + r * x
    arm = Arm.fit(phi, rewards, ridge)
    np.testing.assert_allclose(arm.theta, np.linalg.solve(A, b), rtol=1e-10)
    np.testing.assert_allclose(arm.width(phi[0]), np.sqrt(phi[0] @ np.linalg.solve(A, phi[0])), rtol=1e-10)
    stacked = np.linalg.lstsq(np.vstack([phi, np.sqrt(ridge) * np.eye(3)]), np.append(rewards, np.zeros(3)), rcond=None)
    np.testing.assert_allclose(arm.theta, stacked[0], rtol=1e-10)


def test_an_arm_nobody_tried_is_as_wide_as_the_prompt_is_long() -> None:
    untried = Arm.fit(np.zeros((0, 3)), np.zeros(0), ridge=4.0)
    assert untried.theta.tolist() == [0, 0, 0]
    assert untried.width(np.array([0.0, 3.0, 4.0])) == pytest.approx(5 / 2)


def test_directions_are_the_right_singular_vectors_of_the_samples(prototypes: dict[str, Any]) -> None:
    groups = [prototypes[name] for name in EXPERTS]
    found = directions(groups, 4)
    Vh = np.linalg.svd(np.concatenate(groups).astype(float), full_matrices=False)[2]
    np.testing.assert_allclose(np.abs(np.sum(found * Vh[:4], axis=1)), 1, rtol=1e-6)
    assert directions([], 4).shape == (1, 1)
    assert directions(groups, 99).shape == (DIM, DIM)


def test_rewards_are_retrieval_s_probability_and_what_it_gets_wrong(library: Callable[..., Library]) -> None:
    """The slow twin of the whole choice: every term by its formula."""
    rng = np.random.default_rng(2)
    vectors = unit_rows(rng.standard_normal((12, DIM)).astype(np.float32))
    names = rng.choice(EXPERTS, 12)
    ratings = [Rating(decision=f"{k}", expert=name, score=float(rng.random())) for k, name in enumerate(names)]
    known = library(ratings, vectors)
    settings = BanditSettings(dims=4, candidates=4, share=0)
    method = Bandit.fit(known, settings)
    retrieval = Retrieval.fit(known, RetrievalSettings())
    P = directions(known.sentences, 4)

    def p(x: Any) -> Any:
        return softmax(retrieval.score(ask(known, x)), retrieval.temperature)

    for x in unit_rows(rng.standard_normal((20, DIM)).astype(np.float32)):
        r = p(x).copy()
        for k, name in enumerate(EXPERTS):
            A, b = np.eye(4), np.zeros(4)
            for rating, past in zip(ratings, vectors, strict=True):
                if rating.expert == name:
                    A += np.outer(P @ past, P @ past)
                    b += (rating.score - p(past)[k]) * (P @ past)
            r[k] += (P @ x) @ np.linalg.solve(A, b)
        assert chosen(method, known, x).experts == [(int(r.argmax()), 1.0)]


# What it does


def test_without_feedback_it_is_retrieval(library: Callable[..., Library]) -> None:
    known = library()
    method, retrieval = Bandit.fit(known, BanditSettings()), Retrieval.fit(known, RetrievalSettings())
    for k in range(30):
        x = unit_rows(np.random.default_rng(k).standard_normal((1, DIM)).astype(np.float32))[0]
        queries = ask(known, x, f"prompt {k}")
        ours, theirs = (decide("m", each, known, queries) for each in (method, retrieval))
        assert (ours.experts, ours.confidence, ours.threshold) == (theirs.experts, theirs.confidence, theirs.threshold)


def test_vectors_of_another_encoder_teach_nothing(library: Callable[..., Library]) -> None:
    x = np.eye(DIM, dtype=np.float32)[:1]
    known = library([Rating(decision="1", expert="a", score=0)], x, encoder="other")
    assert Bandit.fit(known, BanditSettings())._arms == {}


def test_it_explores_for_a_share_of_prompts_the_same_in_every_process() -> None:
    texts = [f"prompt {k}" for k in range(2000)]
    share = sum(explored(text, 0.1) for text in texts) / len(texts)
    assert 0.07 < share < 0.13
    assert not any(explored(text, 0.0) for text in texts)
    assert explored("prompt 5", 0.1) == explored("prompt 5", 0.1)
    assert {text for text in texts if explored(text, 0.05)} <= {text for text in texts if explored(text, 0.1)}


def test_it_chooses_among_the_best_few_only_and_says_why(
    library: Callable[..., Library], prototypes: dict[str, Any]
) -> None:
    a, b = (unit_rows(prototypes[name].mean(axis=0, keepdims=True)) for name in "ab")
    x = unit_rows(1.02 * a + b)
    blame = [Rating(decision=f"{name}{k}", expert=name, score=0) for name in "abc" for k in range(9)]
    known = library(blame[:9], np.repeat(x, 9, axis=0))
    narrow = Bandit.fit(known, BanditSettings(candidates=2, share=0))
    choice = chosen(narrow, known, x[0])
    assert EXPERTS[choice.experts[0][0]] == "b"
    assert choice.reason == "b is preferred to a, after users' feedback"
    known = library(blame, np.repeat(x, 27, axis=0))
    choice = chosen(Bandit.fit(known, BanditSettings(candidates=2, share=0)), known, x[0])
    assert EXPERTS[choice.experts[0][0]] in "ab", "d would do better, but is far behind"


def regret(library: Callable[..., Library], settings: BanditSettings, rounds: int, seed: int, *, learns: bool) -> float:
    """Of a world that has shifted: prompts near `a` are answered better by `b`, which retrieval ranks second."""
    rng = np.random.default_rng(seed)
    ratings: list[Rating] = []
    vectors: list[Any] = []
    lost = 0.0
    known = library()
    method = Bandit.fit(known, settings)
    for k in range(rounds):
        x = unit_rows((np.eye(DIM)[[0]] + 0.8 * np.eye(DIM)[[1]] + 0.1 * rng.standard_normal((1, DIM))).astype("f4"))[0]
        name = EXPERTS[chosen(method, known, x, f"prompt {seed} {k}").experts[0][0]]
        reward = {"a": 0.2, "b": 0.9}.get(name, 0.1)
        lost += 0.9 - reward
        ratings.append(Rating(decision=f"{k}", expert=name, score=float(rng.random() < reward)))
        vectors.append(x)
        if learns and k % 20 == 19:
            known = library(ratings, np.stack(vectors))
            method = Bandit.fit(known, settings)
    return lost


def test_in_a_world_that_has_shifted_it_regrets_less_than_greedy_routing(library: Callable[..., Library]) -> None:
    greedy = sum(regret(library, BanditSettings(share=0), 160, seed, learns=False) for seed in range(3))
    bandit = sum(regret(library, BanditSettings(share=0.1), 160, seed, learns=True) for seed in range(3))
    assert bandit < 0.6 * greedy
