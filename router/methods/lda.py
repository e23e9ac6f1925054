"""Linear discriminant analysis: distances to the experts' means, measured by how samples scatter around them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from router.encoder import Vectors
from router.library import Library
from router.method import MethodSettings, Query, Scores
from router.mixture import Mixing, MixtureSettings
from router.taxonomy import FROM_SAMPLES, Reference, Taxonomy

Matrix = NDArray[np.float64]

BACKGROUND = 0.75  # b: how much of the distance to the middle of all experts is taken off
REFUSED = 0.02  # share of the experts' own held-out samples that the threshold gives up
HELD_OUT = 1024  # samples that the threshold is taken from
FLAT = 1e-12  # variances under this are rounding
TEMPERATURE = 1.0  # measured on ni150 (docs/experiments.md)


class LDASettings(MixtureSettings):
    """shrinkage  rho, the sphere's share of the covariance; None: D / (f + D)
    threshold  score under which the base model answers; None: from held-out samples
    """

    shrinkage: float | None = Field(default=None, gt=0, le=1)
    threshold: float | None = None


@dataclass(frozen=True, eq=False)
class Scatter:
    """Of samples around their expert's mean: what remains when experts come and go.

    rows   (n_k, D) samples by key
    total  (D, D) S = sum_k sum_j (x_kj - m_k)(x_kj - m_k)^T
    """

    rows: Mapping[str, Vectors]
    total: Matrix

    @property
    def freedom(self) -> int:
        """f, the number of independent differences in S."""
        return sum(max(len(rows) - 1, 0) for rows in self.rows.values())

    def changed(self, rows: Mapping[str, Vectors]) -> Scatter:
        """With these samples instead: only those that come or go are read."""
        come = _differences([rows[key] for key in rows if key not in self.rows], len(self.total))
        gone = _differences([self.rows[key] for key in self.rows if key not in rows], len(self.total))
        return Scatter(rows, self.total + come.T @ come - gone.T @ gone)


class LDA(Mixing):
    """With m_k the mean of expert k's n_k samples, m the mean of all m_k, W the covariance of samples around the mean
    of their expert, and d(x, y)^2 = (x - y)^T W^-1 (x - y) for a prompt's features x (D,),

        s_k = (b d(x, m)^2 - d(x, m_k)^2) / (1 + 1 / n_k) / u,    u^2 = 2 tr (W^-1 S / f)^2

    so a prompt is compared in units of the scatter that is usual in each direction, and one that is far from everything
    is no expert's (relative Mahalanobis distance, Ren et al. 2021, there with b = 1). 1 + 1 / n_k is for means of few
    samples, which are badly placed. u, the standard deviation of an own prompt's d^2 if samples are normal, makes the
    scores of different libraries comparable.

        W = (1 - rho) S / f + rho t I,    rho = D / (f + D),    t = tr S / (f D)

    is the mode under an inverse-Wishart prior of D observations of a sphere: with few samples d is Euclidean.
    """

    taxonomy: ClassVar[Taxonomy] = replace(
        FROM_SAMPLES,
        reference=Reference(
            title="Relative Mahalanobis distance (Ren et al. 2021)", url="https://arxiv.org/abs/2106.09022"
        ),
    )
    Settings: ClassVar[type[MethodSettings]] = LDASettings

    def __init__(self, library: Library, settings: LDASettings, scatter: Scatter) -> None:
        from scipy.linalg import cho_solve, lapack  # type: ignore[import-untyped]

        self.settings = settings
        self.scatter = scatter
        self.temperature = TEMPERATURE
        groups = [scatter.rows[key] for key in library.keys]
        self._n = np.array([len(rows) for rows in groups])
        self._known = self._n > 0
        means = np.stack(
            [rows.mean(axis=0, dtype=np.float64) for rows in groups if len(rows)] or [np.zeros(library.dim)]
        )
        self.middle = means.mean(axis=0)  # (D,)
        inside = within(scatter, groups)
        self.rho = share(scatter, settings.shrinkage)
        self.covariance = covariance(inside, self.rho)
        # (D, D): with W = L L^T, the squared length of L^-1 x / u^1/2 is d(x, 0)^2 / u.
        L = np.linalg.cholesky(self.covariance)
        whiten: Matrix = lapack.dtrtri(L, lower=1)[0]
        solved = cho_solve((L, True), inside)  # W^-1 S / f
        self._unit = float((2 * (solved * solved.T).sum()) ** 0.5)
        whiten /= self._unit**0.5
        self._means = np.zeros((len(library), library.dim), np.float32)
        self._means[self._known] = ((means - self.middle) @ whiten.T)[: self._known.sum()]
        self._squares = (self._means**2).sum(axis=1)
        self._expected = 1 + 1 / np.maximum(self._n, 1)  # (n,)
        threshold = self._held_out(groups, whiten) if settings.threshold is None else settings.threshold
        self.thresholds = np.full(len(library), threshold)
        self._whiten = whiten.astype(np.float32)

    @classmethod
    def fit(cls, library: Library, settings: MethodSettings, previous: Self | None = None) -> Self:
        """Reads the samples of new and changed experts only; the rest is algebra in D dimensions."""
        assert isinstance(settings, LDASettings)
        known = previous.scatter if previous else Scatter({}, np.zeros((library.dim, library.dim)))
        return cls(library, settings, known.changed(dict(zip(library.keys, library.prototypes, strict=True))))

    def score(self, query: Query) -> Scores:
        x = self._whiten @ (query.vector - self.middle).astype(np.float32)  # (D,)
        length = float(x @ x)
        distances = length - 2 * (self._means @ x) + self._squares  # (n,)
        scores = (BACKGROUND * length - distances) / self._expected
        return np.where(self._known, scores, -np.inf).round(6)

    def _held_out(self, groups: list[Vectors], whiten: Matrix) -> float:
        """The score that all but a few of the experts' own samples reach when each is left out of its mean and of W.

        Leaving r = x - m_k out takes c r r^T off S, c = n / (n - 1), and moves r to c r. By Sherman and Morrison, with
        a = (1 - rho) c / f and h = a r^T W^-1 r,

            d(x, m_k)^2 = c^2 r^T W^-1 r / (1 - h)
            d(x, m)^2   = (x - m)^T W^-1 (x - m) + a (r^T W^-1 (x - m))^2 / (1 - h)

        and 1 + 1 / (n - 1) = c.
        """
        several = [rows for rows in groups if len(rows) > 1]
        if not several:  # no closer to an expert than to the middle
            rows = np.concatenate([*groups, np.zeros((1, len(self.middle)))]) - self.middle
            return float((BACKGROUND - 1) * ((rows @ whiten.T) ** 2).sum(axis=1).mean())
        each = max(1, HELD_OUT // len(several))
        f = self.scatter.freedom
        held = []
        for rows in several:
            some = rows[:: max(1, -(-len(rows) // each))].astype(np.float64)
            c = len(rows) / (len(rows) - 1)
            r = (some - rows.mean(axis=0, dtype=np.float64)) @ whiten.T
            x = (some - self.middle) @ whiten.T
            a = (1 - self.rho) * c * self._unit / f
            q = (r * r).sum(axis=1)
            length = (x * x).sum(axis=1) + a * (r * x).sum(axis=1) ** 2 / (1 - a * q)
            held.append(BACKGROUND / c * length - c * q / (1 - a * q))
        return float(np.quantile(np.concatenate(held), REFUSED))


def share(scatter: Scatter, shrinkage: float | None) -> float:
    """rho."""
    D = len(scatter.total)
    return D / (scatter.freedom + D) if shrinkage is None else shrinkage


def within(scatter: Scatter, groups: list[Vectors]) -> Matrix:
    """S / f (D, D). Without two different samples of one expert, half the covariance of all samples stands for it."""
    D, f = len(scatter.total), scatter.freedom
    if f and np.trace(scatter.total) > FLAT * f * D:
        found: Matrix = scatter.total / f
        return found
    everything = np.concatenate([*groups, np.zeros((2, D))]).astype(np.float64)
    return np.cov(everything.T).reshape(D, D) / 2 + FLAT * np.eye(D)


def covariance(inside: Matrix, rho: float) -> Matrix:
    """W (D, D) for S / f."""
    W: Matrix = (1 - rho) * inside + rho * np.trace(inside) / len(inside) * np.eye(len(inside))
    return W


def _differences(groups: list[Vectors], dim: int) -> Matrix:
    """(N, D): every sample from the mean of its group."""
    return np.concatenate(
        [np.zeros((0, dim)), *(rows - rows.mean(axis=0, dtype=np.float64) for rows in groups if len(rows))]
    )
