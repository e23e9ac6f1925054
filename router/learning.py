"""Learning from use: what users thought of past answers becomes a new router version, if that routes better.

A prompt that an expert answered well counts as one more of its samples; one that it answered badly speaks against it
for prompts that are nearer to that one than to any it is for (`Library.spoiled`). Both are tried on what they were not
made from: old and new router are asked about held-out samples and held-out judgements, fold by fold, and the
differences are bootstrapped in pairs. A user who steers experts by judging what they like best cannot take much:
a router that loses held-out samples is not promoted, and an expert learns from a bounded number of prompts.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from adapters_registry.feedback import Decided
from router import library as libraries
from router.decision import Decision
from router.encoder import Vectors
from router.held_out import part
from router.library import Library
from router.method import Method, MethodSettings, Query, calibrated, decide, fitted
from router.versions import NEUTRAL, Content, Learned, Rating

FOLDS = 5
#: Judgements that must be new for a version to be tried.
FEWEST = 10
#: Prompts that an expert learns from, as many good ones as bad ones; the latest count.
MOST = 50
#: How much of the accuracy on held-out samples a new version may lose (a share of all samples).
TOLERANCE = 0.005
RESAMPLES = 2000

Embed = Callable[[Sequence[str]], Vectors]
#: Told of every fold: how many are done, and of how many.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Judged:
    """A judgement of the one expert that it can be put down to, and the prompt's embedding (dim,)."""

    rating: Rating
    vector: Vectors
    tenant: str | None


class Comparison(BaseModel):
    """Shares of N prompts that the old and the new version route right, and their difference with a 95 % interval."""

    model_config = ConfigDict(frozen=True)

    prompts: int
    old: float
    new: float
    difference: float
    low: float
    high: float


class Report(BaseModel):
    """samples   held-out samples that go to their own expert
    feedback  held-out judgements that are heeded: the praised expert answers, the blamed one does not
    better    whether it should be promoted, and why not
    """

    model_config = ConfigDict(frozen=True)

    method: str
    good: int
    bad: int
    samples: Comparison
    feedback: Comparison
    better: bool
    why: str


def judged(decisions: Iterable[Decided], encoder: str, embed: Embed) -> list[Judged]:
    """The judgements that say something about one expert, in the order of `decisions`.

    An answer of one expert is its own. Of several, praise goes to the one with the largest weight, blame to nobody.
    Embeddings by another encoder than `encoder` are made anew where the text is known, else left out.
    """
    found = []
    for each in decisions:
        expert = _responsible(each)
        text = each.text or None
        usable = each.encoder == encoder and each.vector.size > 0
        if expert is None or each.score is None or not (usable or text):
            continue
        vector = each.vector if usable else embed([text or ""])[0]
        if np.isfinite(vector).all() and vector.any():
            rating = Rating(decision=each.id, expert=expert, score=each.score, text=text)
            found.append(Judged(rating, vector, each.tenant))
    return found


def _responsible(decided: Decided) -> str | None:
    weights = sorted(((float(each["weight"]), str(each["expert"])) for each in decided.experts), reverse=True)
    if not weights or decided.score is None:
        return None
    if decided.kind == "select":
        return weights[0][1]
    alone = len(weights) == 1 or weights[0][0] > weights[1][0]
    return weights[0][1] if alone and decided.score > NEUTRAL else None


def fresh(old: Learned, known: Sequence[Judged]) -> list[Judged]:
    """What the old version does not know yet; judgements that are neither good nor bad only where they change one."""
    before = {rating.decision: rating for rating in old.content.ratings}
    return [
        each
        for each in known
        if before.get(each.rating.decision) != each.rating
        and (each.rating.score != NEUTRAL or each.rating.decision in before)
    ]


def taught(old: Learned, new: Sequence[Judged], encoder: str, embed: Embed) -> Learned:
    """The old version with these judgements; of each expert's, the last `MOST` good and bad ones. It has no number."""
    rows: dict[str, tuple[Rating, Vectors]] = {}
    for rating, vector in zip(old.content.ratings, old.vectors, strict=True):
        if old.content.encoder == encoder:
            rows[rating.decision] = (rating, vector)
        elif rating.text is not None:
            rows[rating.decision] = (rating, embed([rating.text])[0])
    for each in new:
        rows.pop(each.rating.decision, None)
        rows[each.rating.decision] = (each.rating, each.vector)
    kept: list[tuple[Rating, Vectors]] = []
    seen: Counter[tuple[str, bool]] = Counter()
    for rating, vector in reversed(rows.values()):
        which = (rating.expert, rating.score > NEUTRAL)
        if rating.score != NEUTRAL and seen[which] < MOST:
            seen[which] += 1
            kept.append((rating, vector))
    kept.reverse()
    content = Content(
        number=0,
        created_at=datetime.now(UTC),
        ratings=tuple(rating for rating, _ in kept),
        encoder=encoder,
        calibration=old.calibration,
    )
    vectors = np.stack([vector for _, vector in kept]) if kept else np.zeros((0, 0), np.float32)
    return Learned(content, vectors)


@dataclass(frozen=True, eq=False)
class Trial:
    """Everything that old and new versions are fitted alike with."""

    name: str
    kind: type[Method]
    settings: MethodSettings
    library: Library  # with the old version
    encoder: str
    embed: Embed

    def with_(self, learned: Learned) -> Library:
        return libraries.build(
            self.library.experts,
            self.embed,
            self.library.dim,
            max_rank=self.library.max_rank,
            previous=self.library,
            learned=learned,
            encoder=self.encoder,
            head=self.library.head,
        )

    def fit(self, library: Library) -> Method:
        stored = library.learned.calibration.get(self.name)
        return calibrated(fitted(self.kind, library, self.settings), stored, self.settings, self.encoder)


def compare(trial: Trial, new: Sequence[Judged], tell: Progress = lambda done, of: None) -> Report:
    """The old version against one that knows `new` as well: fold by fold, each asked about what it does not know."""
    old = trial.library.learned
    said = [each for each in new if each.rating.score != NEUTRAL]
    on_samples: list[tuple[bool, bool]] = []
    on_feedback: list[tuple[bool, bool]] = []
    for fold in range(FOLDS):
        told = [each for each in new if _fold(each.vector) != fold]
        asked = [each for each in said if _fold(each.vector) == fold]
        taught_library = trial.with_(taught(old, told, trial.encoder, trial.embed))
        rights = [_right(trial, library, fold, asked) for library in (trial.library, taught_library)]
        on_samples += zip(rights[0][0], rights[1][0], strict=True)
        on_feedback += zip(rights[0][1], rights[1][1], strict=True)
        tell(fold + 1, FOLDS)
    samples, feedback = _comparison(on_samples), _comparison(on_feedback)
    why = _against(len(said), samples, feedback)
    good = sum(each.rating.score > NEUTRAL for each in said)
    return Report(
        method=trial.name,
        good=good,
        bad=len(said) - good,
        samples=samples,
        feedback=feedback,
        better=not why,
        why=why,
    )


def _against(judgements: int, samples: Comparison, feedback: Comparison) -> str:
    if judgements < FEWEST:
        return f"{judgements} new judgements say too little; {FEWEST} are needed"
    if samples.difference < -TOLERANCE:
        return f"it loses {-samples.difference:.1%} of the held-out samples, more than {TOLERANCE:.1%}"
    if feedback.low <= 0:
        return "it heeds held-out judgements no better than the version in force (the interval is not above 0)"
    return ""


def _fold(vector: Vectors) -> int:
    """The same prompt, judged twice, is held out as one."""
    return hashlib.sha256(np.ascontiguousarray(vector, np.float32).tobytes()).digest()[0] % FOLDS


def _right(trial: Trial, library: Library, fold: int, asked: Sequence[Judged]) -> tuple[list[bool], list[bool]]:
    """Whether each held-out sample and each of these judgements is routed right, by a method fitted without them."""
    rows, samples = [], []
    for k, (texts, vectors) in enumerate(zip(library.texts, library.prototypes, strict=True)):
        lent = len(library.registered[k]) if len(texts) >= len(library.registered[k]) >= 2 else 0
        out = range(fold, lent, FOLDS)
        samples += [(texts[j], vectors[j], library.experts[k].name) for j in out]
        rows.append([j for j in range(len(vectors)) if j not in out])
    reduced = part(library, rows)
    method = trial.fit(reduced)

    def route(text: str, vector: Vectors, tenant: str | None) -> Decision:
        seen = vector if method.encodes else np.zeros_like(vector)
        return decide(trial.name, method, reduced, Query(text, seen, reduced.visible(tenant)), limit=1)

    on_samples = [_best(route(text, vector, None), abstains=True) == own for text, vector, own in samples]
    on_feedback = []
    for each in asked:
        who = _best(route(each.rating.text or "", each.vector, each.tenant), abstains=False)
        on_feedback.append((who == each.rating.expert) == (each.rating.score > NEUTRAL))
    return on_samples, on_feedback


def _best(decision: Decision, *, abstains: bool) -> str | None:
    """Who answers; else who would, had the prompt passed the threshold: judged ones did, perhaps by words not kept."""
    if decision.kind == "select":
        return decision.experts[0].expert
    if not decision.candidates or (abstains and decision.kind == "base"):
        return None
    return decision.candidates[0].expert


def _comparison(rights: Sequence[tuple[bool, bool]]) -> Comparison:
    """Paired bootstrap of the difference: prompts are drawn anew, each with both of its outcomes."""
    if not rights:
        return Comparison(prompts=0, old=0, new=0, difference=0, low=0, high=0)
    old, new = np.array(rights, float).T
    low, high = _interval(new - old)
    return Comparison(
        prompts=len(rights),
        old=float(old.mean()),
        new=float(new.mean()),
        difference=float((new - old).mean()),
        low=low,
        high=high,
    )


def _interval(differences: NDArray[np.float64]) -> tuple[float, float]:
    from scipy.stats import bootstrap  # type: ignore[import-untyped]

    if len(differences) < 2 or np.ptp(differences) == 0:
        return float(differences.mean()), float(differences.mean())
    rng = np.random.default_rng(0)
    options: dict[str, Any] = {"n_resamples": RESAMPLES, "batch": 100, "method": "percentile", "rng": rng}
    found = bootstrap((differences,), np.mean, **options).confidence_interval
    return float(found.low), float(found.high)
