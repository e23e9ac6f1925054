from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier

from router.encoder import Vectors
from router.library import Library
from router.method import Query, decide
from router.methods import METHODS, SERVED
from router.methods.classifier import (
    LENGTH,
    PENALTY,
    Classifier,
    ClassifierSettings,
    balanced,
    forward,
    likeliest_temperature,
    neural,
    samples_of,
    threshold_between,
    whitening,
)
from router.methods.lda import LDA, LDASettings
from tests.router.methods.conftest import DIM, MakeExpert, ask, groups_of, library_of, unit

Model = Literal["logistic", "mlp"]
MODELS = pytest.mark.parametrize("model", ["logistic", "mlp"])


def fit(library: Library, model: Model = "logistic", previous: Classifier | None = None) -> Classifier:
    return Classifier.fit(library, ClassifierSettings(model=model), previous)


def white(library: Library, X: Vectors) -> Vectors:
    """Features whitened step by step."""
    lda = LDA.fit(library, LDASettings())
    values, vectors = np.linalg.eigh(np.linalg.inv(lda.covariance))
    root = np.diag(values**0.5) @ vectors.T  # root^T root = W^-1
    rows = np.concatenate(library.prototypes)
    length = np.sqrt(np.mean([np.sum((root @ (x - lda.middle)) ** 2) for x in rows]))
    result: Vectors = np.array([root @ (x - lda.middle) for x in X]) * LENGTH / length
    return result


@pytest.mark.parametrize("sizes", [[8, 3, 5], [12, 1, 4, 6], [6, 9]])
def test_scores_are_those_of_softmax_regression_by_its_formula(make_expert: MakeExpert, sizes: list[int]) -> None:
    """The slow twin: the sum that the class' docstring writes down, minimised with gradients by differences."""
    library = library_of(make_expert, groups_of(sizes))
    y = np.repeat(np.arange(len(sizes)), sizes)
    X = white(library, np.concatenate(library.prototypes))
    K = len(sizes)
    penalty = PENALTY["logistic"] * (2 if K == 2 else 1)  # two rows V and -V in place of one of twice the length

    def loss(flat: Vectors) -> float:
        V, b = flat[: K * DIM].reshape(K, DIM), flat[K * DIM :]
        total = penalty / 2 * np.sum(V**2)
        for x, k in zip(X, y, strict=True):
            total -= len(y) / K / sizes[k] * log_softmax(V @ x + b)[k]
        return float(total)

    found = minimize(loss, np.zeros(K * (DIM + 1)), tol=1e-8).x
    V, b = found[: K * DIM].reshape(K, DIM), found[K * DIM :]
    method = fit(library)
    for q in unit(np.random.default_rng(1).standard_normal((5, DIM))):
        wanted = V @ white(library, q[None])[0] + b
        scores = method.score(ask(library, q))
        np.testing.assert_allclose(scores - scores.mean(), wanted - wanted.mean(), atol=0.02)


def test_the_network_is_scikit_learns(make_expert: MakeExpert) -> None:
    library = library_of(make_expert, groups_of([8, 4, 6]))
    samples = samples_of(library)
    X = whitening(LDA.fit(library, LDASettings()), samples.X)(samples.X)
    other = MLPClassifier((256,), alpha=1.0, batch_size=len(X), random_state=np.random.RandomState(0))
    for _ in range(30):
        other.partial_fit(X.astype(np.float32), samples.y, balanced(samples.y), classes=np.arange(3))
    logits = forward(neural(X, samples.y, 1.0), X)
    np.testing.assert_allclose(
        np.exp(log_softmax(logits, axis=1)), other.predict_proba(X.astype(np.float32)), atol=1e-5
    )


@MODELS
def test_folding_the_whitening_into_the_first_layer_changes_no_score(make_expert: MakeExpert, model: Model) -> None:
    library = library_of(make_expert, groups_of([8, 4, 6]))
    samples = samples_of(library)
    transform = whitening(LDA.fit(library, LDASettings()), samples.X)
    layers = neural(transform(samples.X), samples.y, PENALTY[model])
    if model == "logistic":
        layers = layers[1:]
        layers = ((layers[0][0][:, :DIM], layers[0][1]),)
    np.testing.assert_allclose(
        forward(transform.folded(layers), samples.X), forward(layers, transform(samples.X)), atol=1e-9
    )
    U, c = transform.folded(layers)[0]
    np.testing.assert_allclose(transform.unfolded(U, c)[0], layers[0][0], atol=1e-9)
    np.testing.assert_allclose(transform.unfolded(U, c)[1], layers[0][1], atol=1e-9)


@MODELS
def test_it_finds_whose_a_prompt_is_and_the_same_every_time(make_expert: MakeExpert, model: Model) -> None:
    groups = groups_of([20, 20, 20, 5])
    library = library_of(make_expert, groups)
    one, two = fit(library, model), fit(library, model)
    new = groups_of([30, 20, 20, 5])  # the same directions: the first expert's samples are drawn first
    hits = [decide("x", one, library, ask(library, q)).candidates[0].expert == "e0" for q in new["e0"][20:]]
    assert np.mean(hits) >= 0.8
    for q in new["e0"][20:23]:
        np.testing.assert_array_equal(one.score(ask(library, q)), two.score(ask(library, q)))
    assert one.temperature == two.temperature
    assert one.thresholds is not None
    assert two.thresholds is not None
    np.testing.assert_array_equal(one.thresholds, two.thresholds)


def test_a_warm_start_changes_how_long_it_takes_but_not_what_is_found(make_expert: MakeExpert) -> None:
    groups = groups_of([6, 1, 9, 8])
    method: Classifier | None = None
    for names in (["e0"], ["e0", "e1", "e3"], ["e1", "e2", "e3"], [], ["e2", "e3"], ["e0", "e2", "e3"]):
        library = library_of(make_expert, {name: groups[name] for name in names})
        method, anew = fit(library, previous=method), fit(library)
        assert method.start.keys() == anew.start.keys()
        for q in unit(np.random.default_rng(3).standard_normal((3, DIM))):
            np.testing.assert_allclose(method.score(ask(library, q)), anew.score(ask(library, q)), atol=0.02)


def test_a_warm_start_takes_fewer_steps(make_expert: MakeExpert, monkeypatch: pytest.MonkeyPatch) -> None:
    library = library_of(make_expert, groups_of([20] * 6))
    first = fit(library)
    steps: list[int] = []
    original = LogisticRegression.fit

    def counted(self: LogisticRegression, *args: object, **more: object) -> LogisticRegression:
        result = original(self, *args, **more)
        steps.append(int(result.n_iter_[0]))
        return result

    monkeypatch.setattr(LogisticRegression, "fit", counted)
    fit(library)
    fit(library, previous=first)
    assert steps[2] < steps[0]


@MODELS
def test_scores_of_the_visible_are_the_same_whoever_is_hidden(make_expert: MakeExpert, model: Model) -> None:
    library = library_of(make_expert, groups_of([6, 6, 6]))
    method = fit(library, model)
    vector = library.prototypes[1][0]
    hidden = Query("text", vector, np.array([True, False, True]))
    np.testing.assert_array_equal(method.score(hidden), method.score(ask(library, vector)))
    decision = decide("x", method, library, hidden)
    assert {each.expert for each in decision.candidates} == {"e0", "e2"}
    assert 0 <= decision.confidence <= 1


@MODELS
def test_experts_without_samples_are_not_scored_and_disturb_nobody(make_expert: MakeExpert, model: Model) -> None:
    groups = groups_of([6, 0, 6, 0])
    library = library_of(make_expert, groups)
    without = library_of(make_expert, {name: groups[name] for name in ("e0", "e2")})
    q = groups["e2"][0]
    scores = fit(library, model).score(ask(library, q))
    assert np.isfinite(scores).tolist() == [True, False, True, False]
    if model == "logistic":
        np.testing.assert_allclose(scores[[0, 2]], fit(without, model).score(ask(without, q)), atol=0.02)


@MODELS
@pytest.mark.parametrize("sizes", [[], [0], [4], [4, 0], [1, 1, 1], [0, 0]])
def test_where_nothing_can_be_learned_scores_are_ldas(make_expert: MakeExpert, model: Model, sizes: list[int]) -> None:
    library = library_of(make_expert, groups_of(sizes))
    method, lda = fit(library, model), LDA.fit(library, LDASettings())
    q = np.eye(DIM, dtype=np.float32)[0]
    np.testing.assert_array_equal(method.score(ask(library, q)), lda.score(ask(library, q)))
    assert method.thresholds is not None
    assert lda.thresholds is not None
    np.testing.assert_array_equal(method.thresholds, lda.thresholds)
    assert (decide("x", method, library, ask(library, q)).kind == "base") or any(sizes)


@MODELS
@pytest.mark.parametrize("rows", [2, 7])
def test_identical_samples_are_fine(make_expert: MakeExpert, model: Model, rows: int) -> None:
    axis = np.eye(DIM, dtype=np.float32)
    library = library_of(make_expert, {"a": axis[[0] * rows], "b": axis[[1] * rows], "twin": axis[[1] * rows]})
    method = fit(library, model)
    scores = method.score(ask(library, axis[1]))
    assert np.isfinite(scores).all()
    assert scores[[1, 2]].min() > scores[0]
    if model == "logistic":  # the network's first weights are drawn at random
        assert decide("x", method, library, ask(library, axis[1])).candidates[0].expert == "b"
        assert scores[1] == pytest.approx(scores[2], abs=1e-3)
    same = library_of(make_expert, {"a": axis[[0] * rows], "b": axis[[0] * rows]})
    assert np.isfinite(fit(same, model).score(ask(same, axis[0]))).all()


def test_an_expert_with_more_samples_is_not_likelier_for_it() -> None:
    y = np.array([0, 0, 0, 0, 1, 2, 2])
    weights = balanced(y)
    np.testing.assert_allclose(np.bincount(y, weights), len(y) / 3)


def test_the_temperature_is_the_likeliest() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((4000, 5)) * 2
    y = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)  # drawn from softmax(logits)
    assert likeliest_temperature(3 * logits, y) == pytest.approx(3, rel=0.1)


def test_the_threshold_goes_down_where_other_experts_are_far() -> None:
    y = np.arange(40) % 4
    near = np.random.default_rng(0).standard_normal((40, 4))
    assert threshold_between(near, y) == pytest.approx(np.quantile(near.max(axis=1), 0.05))
    far = np.where(np.eye(4)[y] > 0, 10.0, -2.0)
    assert threshold_between(far, y) == pytest.approx(4)


@MODELS
def test_a_threshold_of_ones_own_counts_for_all(make_expert: MakeExpert, model: Model) -> None:
    library = library_of(make_expert, groups_of([6, 6]))
    method = Classifier.fit(library, ClassifierSettings(model=model, threshold=1e6))
    assert decide("x", method, library, ask(library, library.prototypes[0][0])).kind == "base"


def test_it_has_a_name_and_is_served_only_where_configuration_names_it() -> None:
    assert METHODS["classifier"] is Classifier
    assert "classifier" not in SERVED
