"""Retrieve, then gate: retrieval shortlists a few experts, and a gate weighs them for every token and module."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from router.decision import Verdict
from router.library import Library
from router.method import Choice, Method, MethodSettings, Query, Scores, distinct, fitted
from router.methods.retrieval import Retrieval, RetrievalSettings, ScoringSettings
from router.taxonomy import Taxonomy

if TYPE_CHECKING:
    from router.gating.gate import Gate

#: The gates that are methods, all in `router.gating.GATES`; that module imports PyTorch, so it is asked late.
NAMES = ("arrow", "spectr", "lag", "smile", "phatgoose", "meteora", "hilora", "constant", "evidence", "probe")
#: Those whose experts must have been trained for them (`moerge gates train`).
TRAINED = ("phatgoose", "meteora")


def gate_type(name: str) -> type[Gate]:
    from router.gating import GATES

    return GATES[name]


class GatedSettings(ScoringSettings):
    """shortlist    members of a composite at most
    mass         None, or the shortlist ends when its experts' probability (retrieval's own) reaches this; when the
                 first alone does, it answers without a gate
    alpha        None, or the shortlist holds the right expert with probability 1 - alpha, if it was calibrated
    cold         places of the shortlist for experts without samples, which retrieval cannot judge, taken in turn;
                 with a place for them the method does not abstain
    group        these experts always, by name, instead of a shortlist; then it does not abstain
    temperature  of the softmax over retrieval's scores that makes the members' weights
    compress     None, or every member is cut to so many of its strongest directions, so that more of them fit
    general      None, or an expert of general knowledge, by name, subtracted from every member (GenKnowSub)
    gate         the gate's own settings ({} for the defaults)
    """

    name: ClassVar[str]

    shortlist: int = Field(default=4, ge=2, le=64)
    mass: float | None = Field(default=None, gt=0, le=1)
    alpha: float | None = Field(default=None, gt=0, lt=1)
    cold: int = Field(default=1, ge=0)
    group: tuple[str, ...] = ()
    temperature: float = Field(default=0.2, gt=0)
    compress: int | None = Field(default=None, ge=1)
    general: str | None = None
    gate: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _settings_that_the_gate_has(self) -> Self:
        if self.gate:
            gate_type(self.name).Settings.model_validate(self.gate)
        if self.gate.get("weights") is not None:
            raise ValueError("a mixture's weights are retrieval's; requests can bring their own (moerge.experts)")
        return self

    def retrieval(self) -> RetrievalSettings:
        """The part that the shortlist is made with: gates that agree on it share one index."""
        return RetrievalSettings(**{name: getattr(self, name) for name in ScoringSettings.model_fields})


class PriorSettings(GatedSettings):
    """prior  start from retrieval's weights instead of equal ones: softmax(log prior + beta E)"""

    prior: bool = True


class ProbeSettings(PriorSettings):
    """beta   how much a unit of evidence counts
    blend  all members answer, by their probability, instead of the likeliest alone
    """

    beta: float = Field(default=0.002, gt=0)
    blend: bool = False


class _OfGate:
    """A gate's taxonomy, looked up when somebody asks."""

    def __get__(self, method: Gated | None, kind: type[Gated]) -> Taxonomy:
        return gate_type(kind.name).taxonomy


class Gated(Method):
    """Members stand in the order of their names, so that prompts with the same shortlist share one composite."""

    name: ClassVar[str]
    taxonomy = _OfGate()

    def __init__(self, library: Library, settings: GatedSettings, retrieval: Retrieval) -> None:
        self.settings = settings
        self.retrieval = retrieval
        self.temperature = retrieval.temperature
        self.thresholds = None if settings.group else retrieval.thresholds
        gate = gate_type(self.name)
        self.gate_settings = gate.Settings.model_validate(settings.gate).model_dump(mode="json")
        self.weighted = settings.prior if isinstance(settings, PriorSettings) else gate.takes_weights
        self.encodes = self.weighted or not settings.group
        self._max_rank = library.max_rank
        self._general = next((k for k, each in enumerate(library.experts) if each.name == settings.general), None)
        self._ids = [expert.id for expert in library.experts]
        taken = 0 if self._general is None else library.experts[self._general].rank
        ranks = [expert.rank + taken for expert in library.experts]
        self._rows = [min(rank, settings.compress or rank) + gate.extra for rank in ranks]
        self._library = library
        self._cold = np.array([not expert.samples for expert in library.experts], bool)  # (n,)
        self._group = np.array([expert.name in settings.group for expert in library.experts], bool)  # (n,)

    @classmethod
    def fit(cls, library: Library, settings: MethodSettings, previous: Self | None = None) -> Self:
        assert isinstance(settings, GatedSettings)
        retrieval = fitted(Retrieval, library, settings.retrieval(), previous.retrieval if previous else None)
        return cls(library, settings, retrieval)

    def score(self, query: Query) -> Scores:
        if not self.settings.group:
            return self.retrieval.score(query)
        query = replace(query, among=query.among & self._group)
        scores = self.retrieval.score(query) if self.encodes else np.zeros(len(self._group))
        return np.where(query.among, scores, -np.inf)

    def explores(self, query: Query) -> bool:
        return self.settings.cold > 0 and bool((query.among & self._cold).any())

    def choose(self, query: Query, scores: Scores, ranked: Sequence[int]) -> Choice:
        general = self._general if self._general is not None and query.among[self._general] else None
        ranked = [k for k in ranked if k != general] or ranked
        wanted = distinct(
            self._library, list(ranked) if self.settings.group else self._shortlist(query, scores, ranked)
        )
        members = sorted(self._fitting(wanted))
        reason = ""
        if len(members) < len(wanted):
            reason = f"{len(members)} of {len(wanted)} experts fit a composite of {self._max_rank} rows"
        if len(members) < 2:
            return Choice([(wanted[0], 1.0)], reason=reason)
        weights = self._weights(scores[members], self._cold[members])
        verdict = None
        if isinstance(self.settings, ProbeSettings):
            verdict = Verdict(beta=self.settings.beta, blend=self.settings.blend)
        return Choice(
            list(zip(members, weights.tolist(), strict=True)),
            kind="gate",
            gate=self.name,
            gate_settings=self.gate_settings,
            verdict=verdict,
            general=None if general is None else self._ids[general],
            compress=self.settings.compress,
            reason=reason,
        )

    def _shortlist(self, query: Query, scores: Scores, ranked: Sequence[int]) -> list[int]:
        """The best experts, with experts without samples in the last places: which ones, the prompt's hash says."""
        size, apart = self.settings.shortlist, self._cold & (self.settings.cold > 0)
        cold = [k for k in np.flatnonzero(query.among & apart).tolist() if k != self._general]
        warm = [k for k in ranked if not apart[k]]
        places = min(len(cold), max(self.settings.cold, size - len(warm)), size - bool(warm))
        best = warm[: self.candidates(scores, size - places, self.settings.alpha)]
        if self.settings.mass is not None and best:
            shares = np.exp((scores[warm] - scores[warm[0]]) / self.temperature)
            enough = np.searchsorted(np.cumsum(shares) / shares.sum(), self.settings.mass - 1e-9) + 1
            best = best[:enough]
        start = int.from_bytes(hashlib.sha256(query.text.encode(errors="surrogatepass")).digest()[:6], "big")
        return best + [cold[(start + j) % len(cold)] for j in range(places)]

    def _fitting(self, wanted: Sequence[int]) -> list[int]:
        """Those that fit the engine's rank together: the first, then experts without samples, then the others."""
        left = math.inf if self._max_rank is None else self._max_rank
        kept: list[int] = []
        for k in [wanted[0], *sorted(wanted[1:], key=lambda k: not self._cold[k])]:
            if self._rows[k] <= left:
                left -= self._rows[k]
                kept.append(k)
        return kept

    def _weights(self, scores: Scores, cold: NDArray[np.bool_]) -> NDArray[np.float64]:
        """(K,) softmax(scores / temperature), or equal ones; an expert without samples has the mean, 1/K."""
        K = len(scores)
        weights = np.full(K, 1 / K)
        if self.weighted and not cold.all():
            shares = np.exp((scores[~cold] - scores[~cold].max()) / self.settings.temperature)
            weights[~cold] = shares / shares.sum() * (1 - cold.sum() / K)
        return weights


def gated(name: str) -> type[Gated]:
    """The method `auto:<name>` for a gate."""
    base = {"evidence": PriorSettings, "probe": ProbeSettings}.get(name, GatedSettings)
    settings = type(f"{name.title()}Settings", (base,), {"name": name, "__module__": __name__})
    return type(name.title(), (Gated,), {"name": name, "Settings": settings, "__module__": __name__})
