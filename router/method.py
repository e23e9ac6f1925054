"""What a routing method is, and the code that all methods share: from scores to a decision."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from router.batching import Vector
from router.calibration import Calibration
from router.decision import Candidate, Decision, Kind, Verdict, Weighted
from router.library import Library, Mask
from router.taxonomy import Taxonomy

Scores = NDArray[np.float64]


class MethodSettings(BaseModel):
    """A method's settings: small, frozen, strict."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """One prompt to route: its text, its embedding (dim,), and a mask (n,) of the experts it may use.

    The vector is zero for methods that do not need one (`encodes` is false).
    """

    text: str
    vector: Vector
    among: Mask


@dataclass(frozen=True, slots=True)
class Choice:
    """Who answers: (position in the library, weight) of each; the other fields as in a Decision."""

    experts: Sequence[tuple[int, float]]
    kind: Kind = "select"
    operator: str | None = None
    operator_settings: Mapping[str, Any] = field(default_factory=dict)
    gate: str | None = None
    gate_settings: Mapping[str, Any] = field(default_factory=dict)
    verdict: Verdict | None = None
    general: str | None = None
    compress: int | None = None
    reason: str = ""


class Method(ABC):
    """A routing method, fitted to one library. It never changes, so it serves while its successor is fitted.

    A new method is one file with a subclass, one line in `router.methods`, one test file, one docs row.
    """

    taxonomy: ClassVar[Taxonomy]
    Settings: ClassVar[type[MethodSettings]] = MethodSettings
    encodes: bool = True  # whether it reads the prompt's embedding

    # (n,) the score under which an expert does not answer, None for methods that never abstain.
    thresholds: Scores | None = None
    # Scores divided by the temperature are log-odds.
    temperature: float = 1.0
    # What held-out prompts said about the two, if they were asked.
    calibration: Calibration | None = None

    @classmethod
    @abstractmethod
    def fit(cls, library: Library, settings: MethodSettings, previous: Self | None = None) -> Self:
        """The method for this library; `previous` was fitted with the same settings and may lend its work."""

    @abstractmethod
    def score(self, query: Query) -> Scores:
        """(n,) one score per expert of the library, higher is better; -inf for those it does not consider."""

    def choose(self, query: Query, scores: Scores, ranked: Sequence[int]) -> Choice:
        """Who answers; `ranked` are the considered experts, best first, never empty."""
        return Choice([(ranked[0], 1.0)])

    def explores(self, query: Query) -> bool:
        """Whether it chooses even when no expert reaches its threshold."""
        return False

    def candidates(self, scores: Scores, most: int, alpha: float | None) -> int:
        """How many of the best experts to look at: so many that the right one is among them with probability
        1 - alpha, but `most` at most; `most` without an alpha, or without a calibration to know it from.
        """
        if alpha is None or self.calibration is None:
            return most
        return min(most, self.calibration.size(scores, alpha))


M = TypeVar("M", bound=Method)


def fitted(kind: type[M], library: Library, settings: MethodSettings, previous: M | None = None) -> M:
    """`kind.fit`, done once for a library and these settings: methods that stand on another share it."""
    key = (kind, settings.model_dump_json())
    return library.once(key, lambda: kind.fit(library, settings, previous))


def calibrated(method: M, stored: Any, settings: MethodSettings, encoder: str) -> M:
    """The method with a stored calibration; as it is, if there is none, or none for these settings and this encoder."""
    try:
        found = Calibration.model_validate(stored)
    except ValidationError:
        return method
    if (found.settings, found.encoder) != (settings.model_dump_json(), encoder):
        return method
    result = copy.copy(method)
    result.temperature = found.temperature
    result.thresholds = None if method.thresholds is None else method.thresholds + found.shift
    result.calibration = found
    return result


@dataclass(frozen=True, slots=True)
class Standing:
    """How a fitted method's scores compare: divided by the temperature they are log-odds; an expert whose score is
    under its threshold does not answer (no thresholds: every one may)."""

    temperature: float
    thresholds: Mapping[str, float]


def standing(method: Method, library: Library) -> Standing:
    """Thresholds by expert's name."""
    limits = () if method.thresholds is None else method.thresholds.tolist()
    names = [expert.name for expert in library.experts]
    return Standing(method.temperature, dict(zip(names, limits, strict=False)))


def decide(name: str, method: Method, library: Library, query: Query, limit: int | None = None) -> Decision:
    """Score, rank, then abstain or choose. Lists the best `limit` candidates, None all that were scored.

    Ties go to the first name. Scores that are not finite, and experts outside `query.among`, do not count; nor do
    experts that answered a prompt badly which is clearly nearer than any of their own.
    """
    if not np.isfinite(query.vector).all():
        return abstain(name, library, "the prompt's embedding is not finite")
    if not query.among.any():
        return abstain(name, library, "no expert is available")
    scores = method.score(query)  # (n,)
    scores = np.where(query.among & np.isfinite(scores), scores, -np.inf)
    scores, passed = without_spoiled(library, query, scores)
    order = np.argsort(-scores, kind="stable")  # experts stand in name order
    ranked: list[int] = order[: np.isfinite(scores).sum()].tolist()
    if not ranked:
        return abstain(name, library, _joined("no expert could be scored", passed))

    best = float(scores[ranked[0]])
    threshold = None if method.thresholds is None else float(method.thresholds[ranked[0]])
    options = scores[ranked] if threshold is None else np.append(scores[ranked], threshold)
    answers = threshold is None or best >= threshold or method.explores(query)
    certainty = confidence(options, method.temperature)
    if method.calibration is not None:
        certainty = method.calibration.probability(certainty, answers)
    experts = library.experts
    candidates = tuple(
        Candidate(expert=experts[k].name, version=experts[k].version, score=float(scores[k])) for k in ranked[:limit]
    )
    if not answers:
        why = f"best score {best:.3f} is under the threshold {threshold:.3f}"
        return abstain(name, library, _joined(why, passed), certainty, threshold, candidates)
    choice = method.choose(query, scores, distinct(library, ranked))
    return Decision(
        method=name,
        kind=choice.kind,
        experts=tuple(Weighted(expert=experts[k].name, id=experts[k].id, weight=w) for k, w in choice.experts),
        operator=choice.operator,
        operator_settings=dict(choice.operator_settings),
        gate=choice.gate,
        gate_settings=dict(choice.gate_settings),
        verdict=choice.verdict,
        general=choice.general,
        compress=choice.compress,
        confidence=certainty,
        threshold=threshold,
        candidates=candidates,
        generation=library.generation,
        reason=_joined(choice.reason, passed),
    )


def without_spoiled(library: Library, query: Query, scores: Scores) -> tuple[Scores, str]:
    """(n,) the scores, -inf for experts that users' feedback speaks against; and what is to be said about the best."""
    spoiled = library.spoiled(query.vector)
    best = int(scores.argmax())
    why = ""
    if spoiled[best] and np.isfinite(scores[best]):
        why = f"{library.experts[best].name} was passed over: it answered a prompt badly that is nearer than its own"
    return np.where(spoiled, -np.inf, scores), why


def _joined(*reasons: str) -> str:
    return "; ".join(filter(None, reasons))


def distinct(library: Library, ranked: list[int]) -> list[int]:
    """The same adapter under several names has one place, the best's: a copy gains nobody any weight."""
    experts = library.experts
    if library.once("no copies", lambda: len({expert.digest for expert in experts}) == len(experts)):
        return ranked
    first: dict[str, int] = {}
    for k in ranked:
        first.setdefault(experts[k].digest, k)
    return list(first.values())


def confidence(scores: Scores, temperature: float) -> float:
    """Probability of the largest of these scores (n,) in a softmax at a temperature, in [0, 1].

    The base model takes part with the threshold as its score, so that whatever is decided, expert or
    abstention, has the largest: at the threshold both are equally probable.
    """
    return float(1 / np.exp((scores - scores.max()) / temperature).sum())


def abstain(
    name: str,
    library: Library,
    reason: str,
    certainty: float = 1.0,
    threshold: float | None = None,
    candidates: tuple[Candidate, ...] = (),
) -> Decision:
    """The base model answers, for this reason."""
    return Decision(
        method=name,
        kind="base",
        confidence=certainty,
        threshold=threshold,
        candidates=candidates,
        generation=library.generation,
        reason=reason,
    )
