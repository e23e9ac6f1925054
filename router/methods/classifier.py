"""A learned classifier: multinomial logistic regression, or a small neural network, on whitened features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from router.library import Library
from router.method import MethodSettings, Query, Scores, fitted
from router.methods.lda import LDA, LDASettings
from router.mixture import Mixing, MixtureSettings
from router.taxonomy import FROM_SAMPLES, Reference, Taxonomy

Matrix = NDArray[np.float64]
Layers = tuple[tuple[Matrix, Matrix], ...]  # (out, in) weights and (out,) biases, ReLU in between

LENGTH = 10.0  # root mean square of whitened features' length
PENALTY = {"logistic": 10.0, "mlp": 1.0}  # lambda: measured on ni150 (docs/experiments.md)
HIDDEN, EPOCHS, BATCH = 256, 30, 128  # of the neural network
TOLERANCE, ITERATIONS = 1e-4, 1000  # of logistic regression: largest entry of the gradient, steps at most
EVERY = 5  # of an expert's samples, one in so many is held out
REFUSED = 0.05  # share of held-out samples that the threshold gives up, where experts are alike


class ClassifierSettings(MixtureSettings):
    """model      logistic: multinomial logistic regression; mlp: a neural network with one hidden layer
    penalty    lambda of the squared weights; None: the model's own
    threshold  score under which the base model answers; None: from held-out samples
    """

    model: Literal["logistic", "mlp"] = "logistic"
    penalty: float | None = Field(default=None, gt=0)
    threshold: float | None = None


@dataclass(frozen=True, eq=False)
class Samples:
    """Of the K >= 2 experts that have any, in the library's order.

    X  (N, D) features,  y  (N,) whose they are, 0 ... K - 1,  held  (N,) true for those that are held out
    """

    X: Matrix
    y: NDArray[np.int64]
    held: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Whitening:
    """x -> A (x - m): directions in which all samples scatter count less. A is (D, D), m (D,)."""

    A: Matrix
    m: Matrix

    def __call__(self, X: Matrix) -> Matrix:
        """(N, D) -> (N, D)."""
        return (X - self.m) @ self.A.T

    def folded(self, layers: Layers) -> Layers:
        """The same function of features that are not whitened: V A (x - m) + b = (V A) x + (b - V A m)."""
        (V, b), *rest = layers
        U = V @ self.A
        return (U, b - U @ self.m), *rest

    def unfolded(self, U: Matrix, c: Matrix) -> tuple[Matrix, Matrix]:
        """(K, D), (K,) a layer of features that are not whitened -> the same function of those that are."""
        V = np.asarray(np.linalg.solve(self.A.T, U.T).T, np.float64)
        return V, c + U @ self.m


class Classifier(Mixing):
    """With x' = A (x - m) a prompt's features, whitened by the covariance W of samples around their expert's mean as
    in `lda` (A^T A proportional to W^-1),

        logistic  s = V x' + b
        mlp       s = V2 relu(V1 x' + b1) + b2

    minimise sum_j w_j (-log softmax(s(x_j))_{y_j}) + lambda/2 |V|^2 over all samples, where w_j is inverse to how many
    samples the expert has: nobody is likelier for having more. The scores are s itself, decision values: neither
    changes with who may see which experts. The threshold, and the temperature at which they are log-odds, come from a
    first fit without every fifth sample, at which the second one starts.

    Nothing can be learned from fewer than two experts, or where nobody has two samples: the scores are LDA's then.
    """

    taxonomy: ClassVar[Taxonomy] = replace(
        FROM_SAMPLES,
        reference=Reference(
            title="Logistic regression (Cox 1958)", url="https://doi.org/10.1111/j.2517-6161.1958.tb00292.x"
        ),
    )
    Settings: ClassVar[type[MethodSettings]] = ClassifierSettings

    def __init__(
        self, library: Library, settings: ClassifierSettings, lda: LDA, start: Mapping[str, tuple[Matrix, float]]
    ) -> None:
        self.settings = settings
        self.lda = lda
        self.start: dict[str, tuple[Matrix, float]] = {}  # of each key: its row (D,) and bias without held-out samples
        self._layers: Layers = ()
        self._known = np.array([len(rows) > 0 for rows in library.prototypes], bool)
        samples = samples_of(library) if self._known.sum() > 1 else None
        if samples is None or not samples.held.any():
            self.thresholds, self.temperature = lda.thresholds, lda.temperature
        else:
            threshold = self._learn(
                samples, [key for key, n in zip(library.keys, self._known, strict=True) if n], start
            )
            self.thresholds = np.full(len(library), threshold)
        if settings.threshold is not None:
            self.thresholds = np.full(len(library), settings.threshold)

    @classmethod
    def fit(cls, library: Library, settings: MethodSettings, previous: Self | None = None) -> Self:
        """Learns from all samples again; logistic regression starts where the previous one ended."""
        assert isinstance(settings, ClassifierSettings)
        lda = fitted(LDA, library, LDASettings(), previous.lda if previous else None)
        return cls(library, settings, lda, previous.start if previous else {})

    def score(self, query: Query) -> Scores:
        if not self._layers:
            return self.lda.score(query)
        scores = np.full(len(self._known), -np.inf)
        scores[self._known] = forward(self._layers, query.vector.astype(np.float64)[None])[0]
        return scores.round(4)  # so that equal samples tie

    def _learn(self, samples: Samples, keys: list[str], start: Mapping[str, tuple[Matrix, float]]) -> float:
        """Sets layers and temperature; returns the threshold."""
        white = whitening(self.lda, samples.X)
        X, y, held = white(samples.X), samples.y, samples.held
        penalty = self.settings.penalty or PENALTY[self.settings.model]
        if self.settings.model == "mlp":
            first = neural(X[~held], y[~held], penalty)
            layers = neural(X, y, penalty)
        else:
            first = logistic(X[~held], y[~held], penalty, self._started(white, keys, start))
            layers = logistic(X, y, penalty, first)
            U, c = white.folded(first)[0]
            self.start = {key: (U[k], float(c[k])) for k, key in enumerate(keys)}
        self._layers = white.folded(layers)
        scores = forward(first, X[held])
        self.temperature = likeliest_temperature(scores, y[held])
        return threshold_between(scores, y[held])

    def _started(self, white: Whitening, keys: list[str], start: Mapping[str, tuple[Matrix, float]]) -> Layers:
        """The previous fit's rows, moved to this whitening; zero for experts that are new or changed."""
        zero = np.zeros(white.m.shape)
        U = np.stack([start.get(key, (zero, 0.0))[0] for key in keys])
        c = np.array([start.get(key, (zero, 0.0))[1] for key in keys])
        return (white.unfolded(U, c),)


def samples_of(library: Library) -> Samples:
    groups = [rows for rows in library.prototypes if len(rows)]
    held = [(np.arange(len(rows)) % EVERY == 0) & (len(rows) > 1) for rows in groups]
    y = np.repeat(np.arange(len(groups)), [len(rows) for rows in groups])
    return Samples(np.concatenate(groups).astype(np.float64), y, np.concatenate(held))


def whitening(lda: LDA, X: Matrix) -> Whitening:
    """By LDA's covariance, such that whitened features have length LENGTH in the root mean square."""
    A = np.linalg.inv(np.linalg.cholesky(lda.covariance))
    square = float((((X - lda.middle) @ A.T) ** 2).sum(axis=1).mean())
    return Whitening(A * (LENGTH / square**0.5 if square > 0 else 1.0), lda.middle)


def balanced(y: NDArray[np.int64]) -> Matrix:
    """(N,) weights of samples: equal in sum for every expert, 1 on average."""
    counts = np.bincount(y)
    weights: Matrix = len(y) / (len(counts) * counts[y])
    return weights


def logistic(X: Matrix, y: NDArray[np.int64], penalty: float, start: Layers) -> Layers:
    """Multinomial logistic regression by L-BFGS. The minimum is unique: `start` only says how soon it is found."""
    from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

    model = LogisticRegression(C=1 / penalty, tol=TOLERANCE, max_iter=ITERATIONS, warm_start=True)
    V, b = start[0]
    two = len(b) == 2  # one row then, the second's log-odds
    model.coef_, model.intercept_ = (V[1:] - V[:1], b[1:] - b[:1]) if two else (V.copy(), b.copy())
    model.fit(X, y, sample_weight=balanced(y))
    V, b = of_all(model.coef_, model.intercept_)
    return ((V - V.mean(axis=0), b - b.mean()),)  # softmax does not say where zero is


def neural(X: Matrix, y: NDArray[np.int64], penalty: float) -> Layers:
    """One hidden layer, by Adam for a fixed number of epochs: the same every time."""
    from sklearn.neural_network import MLPClassifier  # type: ignore[import-untyped]

    model: Any = MLPClassifier(
        (HIDDEN,), alpha=penalty, batch_size=min(BATCH, len(y)), random_state=np.random.RandomState(0)
    )
    weights, classes = balanced(y), np.unique(y)
    small = X.astype(np.float32)
    for _ in range(EPOCHS):
        model.partial_fit(small, y, sample_weight=weights, classes=classes)
    (V1, V2), (b1, b2) = model.coefs_, model.intercepts_
    return (V1.T.astype(np.float64), b1.astype(np.float64)), of_all(V2.T.astype(np.float64), b2.astype(np.float64))


def of_all(V: Matrix, b: Matrix) -> tuple[Matrix, Matrix]:
    """A last layer with a row to every expert: for two, scikit-learn has one, the second's log-odds."""
    return (np.concatenate([-V, V]) / 2, np.concatenate([-b, b]) / 2) if len(b) == 1 else (V, b)


def forward(layers: Layers, X: Matrix) -> Matrix:
    """(N, D) -> (N, K)."""
    *inner, (V, b) = layers
    for U, c in inner:
        X = np.maximum(X @ U.T + c, 0)
    scores: Matrix = X @ V.T + b
    return scores


def likeliest_temperature(scores: Matrix, y: NDArray[np.int64]) -> float:
    """T of the likeliest softmax(scores / T), for scores (N, K) of held-out samples (Guo et al. 2017)."""
    from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]
    from scipy.special import log_softmax  # type: ignore[import-untyped]

    def surprise(log_T: float) -> float:
        return -float(log_softmax(scores / np.exp(log_T), axis=1)[np.arange(len(y)), y].mean())

    return float(np.exp(minimize_scalar(surprise, bounds=(-3.0, 3.0), method="bounded").x))


def threshold_between(scores: Matrix, y: NDArray[np.int64]) -> float:
    """What the best scores (N, K) of nearly all held-out samples reach; where those of all experts but the own one stay
    far below that, half way between: who words prompts otherwise than the samples is not foreign yet.
    """
    others = scores.copy()
    others[np.arange(len(y)), y] = -np.inf
    reached = float(np.quantile(scores.max(axis=1), REFUSED))
    foreign = float(np.quantile(others.max(axis=1), 1 - REFUSED))
    return min(reached, (reached + foreign) / 2)
