"""A contextual bandit over retrieval: it learns from feedback which of the best candidates users prefer.

LinUCB with disjoint linear models (Li et al. 2010), on what retrieval gets wrong. With phi(x) the prompt's embedding
in the d directions in which samples are largest, and p_k(x) retrieval's probability of expert k, k's expected reward is

    r_k(x) = p_k(x) + phi(x) . theta_k,    theta_k = A_k^-1 b_k,
    A_k = ridge I + sum_i phi(x_i) phi(x_i)^T,    b_k = sum_i (score_i - p_k(x_i)) phi(x_i),

summed over the judged prompts x_i that k answered. Without feedback it is retrieval. For most prompts the largest r_k
answers; for a `share` of them, picked by a hash of their text, the largest r_k + alpha sqrt(phi^T A_k^-1 phi): whoever
might be better and has not been tried. Always among retrieval's best few, and where the best reaches its threshold.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from router.conformal import softmax
from router.encoder import Vectors
from router.library import Library, sentence
from router.method import Choice, Method, MethodSettings, Query, Scores, fitted
from router.methods.retrieval import Retrieval, RetrievalSettings
from router.taxonomy import FROM_SAMPLES, Reference, Taxonomy

Floats = NDArray[np.float64]


class BanditSettings(MethodSettings):
    """alpha       width of the confidence bound: how much the unknown is worth
    share       of all prompts, those for which it explores
    candidates  retrieval's best experts, among which it chooses
    dims        directions d of the embeddings that count
    ridge       judgements with which the linear models are held to retrieval
    """

    alpha: float = Field(default=0.5, ge=0)
    share: float = Field(default=0.1, ge=0, le=0.5)
    candidates: int = Field(default=3, ge=2, le=10)
    dims: int = Field(default=32, ge=1, le=256)
    ridge: float = Field(default=1.0, gt=0)


@dataclass(frozen=True, eq=False)
class Arm:
    """One expert's ridge regression: theta (d,) and the inverse of A (d, d)."""

    theta: Floats
    inverse: Floats

    @classmethod
    def fit(cls, phi: Floats, rewards: Floats, ridge: float) -> Self:
        """From the features (m, d) and rewards (m,) of m answers."""
        A = ridge * np.eye(phi.shape[1]) + phi.T @ phi
        inverse: Floats = np.linalg.inv(A).astype(np.float64)
        theta: Floats = inverse @ (phi.T @ rewards)
        return cls(theta, inverse)

    def width(self, phi: Floats) -> float:
        return float(np.sqrt(phi @ self.inverse @ phi))


class Bandit(Method):
    taxonomy: ClassVar[Taxonomy] = replace(
        FROM_SAMPLES,
        routing_data="target",
        user_data="few-shot",
        reference=Reference(title="LinUCB (Li et al. 2010)", url="https://arxiv.org/abs/1003.0146"),
    )
    Settings: ClassVar[type[MethodSettings]] = BanditSettings

    def __init__(self, library: Library, settings: BanditSettings, retrieval: Retrieval) -> None:
        self.settings = settings
        self.retrieval = retrieval
        self.thresholds = retrieval.thresholds
        self.temperature = retrieval.temperature
        self._names = [expert.name for expert in library.experts]
        self._head = library.head
        self._directions = directions(library.sentences, settings.dims)  # (d, head)
        self._arms = self._judged(library)
        self._untried = Arm.fit(np.zeros((0, len(self._directions))), np.zeros(0), settings.ridge)

    @classmethod
    def fit(cls, library: Library, settings: MethodSettings, previous: Self | None = None) -> Self:
        assert isinstance(settings, BanditSettings)
        retrieval = fitted(Retrieval, library, RetrievalSettings(), previous.retrieval if previous else None)
        return cls(library, settings, retrieval)

    def score(self, query: Query) -> Scores:
        return self.retrieval.score(query)

    def choose(self, query: Query, scores: Scores, ranked: Sequence[int]) -> Choice:
        known = list(ranked[: self.settings.candidates])
        phi = self._features(query.vector)
        rewards = softmax(scores, self.temperature)[known]  # (K,)
        arms = [self._arms.get(k, self._untried) for k in known]
        rewards = rewards + np.array([phi @ arm.theta for arm in arms])
        best = known[int(rewards.argmax())]
        if not explored(query.text, self.settings.share):
            return Choice([(best, 1.0)], reason="" if best == ranked[0] else self._why("preferred to", best, ranked[0]))
        bounds = rewards + self.settings.alpha * np.array([arm.width(phi) for arm in arms])
        tried = known[int(bounds.argmax())]
        return Choice([(tried, 1.0)], reason="" if tried == best else self._why("tried out for", tried, best))

    def _why(self, what: str, who: int, instead: int) -> str:
        return f"{self._names[who]} is {what} {self._names[instead]}, after users' feedback"

    def _features(self, vector: Vectors) -> Floats:
        """(dim,) -> (d,)."""
        return self._directions @ sentence(vector, self._head).astype(np.float64)

    def _judged(self, library: Library) -> dict[int, Arm]:
        """The arms of experts that were judged, by position in the library."""
        place = {name: k for k, name in enumerate(self._names)}
        seen: dict[int, list[tuple[Floats, float]]] = {}
        everyone = np.ones(len(library), bool)
        for rating, vector in library.judged:
            if (k := place.get(rating.expert)) is not None:
                scores = self.retrieval.score(Query(rating.text or "", vector, everyone))
                residual = rating.score - float(softmax(scores, self.temperature)[k])
                seen.setdefault(k, []).append((self._features(vector), residual))
        return {
            k: Arm.fit(np.stack([phi for phi, _ in rows]), np.array([r for _, r in rows]), self.settings.ridge)
            for k, rows in seen.items()
        }


def directions(groups: Sequence[Vectors], d: int) -> Floats:
    """(d, dim) the directions in which all experts' samples are largest: right singular vectors, signs fixed."""
    rows = np.concatenate([np.zeros((1, groups[0].shape[1] if groups else 1)), *groups]).astype(np.float64)  # (N, dim)
    V = np.linalg.eigh(rows.T @ rows)[1].T[::-1][:d]  # (d, dim), the largest first
    signs = np.sign(V[np.arange(len(V)), np.abs(V).argmax(axis=1)])
    found: Floats = V * signs[:, None]
    return found


def explored(text: str, share: float) -> bool:
    """Whether a prompt is among those that are explored with: the same in every process."""
    digest = hashlib.sha256(b"bandit\0" + text.encode(errors="surrogatepass")).digest()
    return bool(text) and int.from_bytes(digest[:6], "big") / 2**48 < share
