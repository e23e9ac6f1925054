"""How well a router routes, on text alone: experts stand for themselves with samples, and have no weights.

What is measured is `router.router.Router`, the way a server uses it: `refresh` with the experts, then one `route`
to a prompt. Figures follow from its decisions alone.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adapters_registry.expert import Expert, Sample, State
from eval import metrics
from eval.asking import Tell
from eval.encodings import Remembering
from eval.intervals import RESAMPLES, Estimate, Groups, estimate
from eval.prompts import Prompt, Prompts
from router.calibrating import calibrate, calibration_error
from router.decision import Decision
from router.encoder import Vectors
from router.held_out import hold_out
from router.library import Library, build
from router.method import fitted
from router.methods import METHODS
from router.router import Router, RouterSettings
from router.versions import Content, Learned

Flags = NDArray[np.bool_]

TIMED = 200  # prompts whose decisions are timed
WARM_UP = 5


class CalibrationFailed(Exception):
    """A router cannot be calibrated with these samples."""


@dataclass(frozen=True)
class RouterSpec:
    """A router to measure: a routing method with settings, and how the command line names it."""

    name: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcomes:
    """What a router decided for n prompts, one entry to each.

    task        the prompt's own expert, "" or a source for prompts that belong to none
    rank        of its own expert among the candidates, from 1; 0: it is no candidate
    best        the best candidate, whether or not it answers; None: there is no candidate
    margin      how far the best candidate's score is above the one that it needs to answer
    confidence  that the decision is right
    answered    whether an expert answers
    """

    task: tuple[str, ...]
    rank: metrics.Ranks
    best: tuple[str | None, ...]
    margin: metrics.Floats
    confidence: metrics.Floats
    answered: Flags


@dataclass(frozen=True)
class Result:
    """A router's figures; `confusions` are (own expert, best candidate, how often), most frequent first.

    fit_s  seconds from experts whose samples are encoded to a router that serves them
    """

    router: RouterSpec
    metrics: dict[str, Estimate]
    confusions: tuple[tuple[str, str | None, int], ...]
    fit_s: float

    def json(self) -> dict[str, Any]:
        return {
            "router": self.router.name,
            "method": self.router.method,
            "settings": dict(self.router.settings),
            "metrics": {name: each.json() for name, each in self.metrics.items()},
            "confusions": [{"task": task, "answered": best, "count": n} for task, best, n in self.confusions],
            "fit_s": self.fit_s,
        }


def experts_of(samples: Mapping[str, Sequence[str]], descriptions: Mapping[str, str] | None = None) -> list[Expert]:
    """Each task as an expert without weights."""
    return [
        Expert(
            name=name,
            version=1,
            digest=hashlib.sha256(name.encode()).hexdigest(),
            state=State.ACTIVE,
            path=Path(name),
            base_model="none",
            rank=1,
            target_modules=(),
            source="prompts",
            description=(descriptions or {}).get(name, ""),
            samples=tuple(Sample(prompt=text) for text in texts),
        )
        for name, texts in samples.items()
    ]


def library_of(register: Sequence[Prompt], vectors: Vectors) -> Library:
    """Each task as an expert without weights; `vectors` (n, d) are the prompts' embeddings."""
    rows: dict[str, list[int]] = {}
    for number, (task, _) in enumerate(register):
        rows.setdefault(task, []).append(number)
    experts = experts_of({task: [register[n][1] for n in mine] for task, mine in rows.items()})
    stored = {expert.id: vectors[rows[expert.name]] for expert in experts}
    return build(experts, lambda texts: vectors[:0], vectors.shape[1], stored=stored)


def measure(
    spec: RouterSpec,
    prompts: Prompts,
    encoder: Remembering,
    *,
    far: float | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    tell: Tell = lambda what, done, total: None,
) -> Result:
    """Fit the router to the registered prompts, route all others, and time some. Blocks for as long as that takes.

    With `far` it is calibrated first, as `moerge router calibrate --far` does it: on its samples alone.
    """
    experts = experts_of(prompts.samples, prompts.descriptions)
    encoder.prepare(prompts.texts())
    router = Router(encoder, RouterSettings(method=spec.method, methods={spec.method: dict(spec.settings)}))
    try:
        started = time.perf_counter()
        router.refresh(experts)
        fit_s = time.perf_counter() - started
        if far is not None:
            router.refresh(experts, learned=learn(router, spec, far, tell))
        everything = [*prompts.test, *prompts.ood]
        decisions = []
        for done, (_, text) in enumerate(everything):
            tell(spec.name, done, len(everything))
            decisions.append(router.route_sync(text, limit=None))
        own = outcomes(prompts.test, decisions[: len(prompts.test)])
        other = outcomes(prompts.ood, decisions[len(prompts.test) :])
        with encoder.fresh():
            milliseconds = timings(router, prompts.test)
    finally:
        router.close()
    figures = figures_of(own, other, prompts.clusters)
    figures["p50_ms"], figures["p95_ms"] = (_percentile(milliseconds, share) for share in (50, 95))
    estimates: dict[str, Estimate] = {}
    for name, (statistic, populations) in figures.items():
        tell(f"{spec.name}: intervals", len(estimates), len(figures))
        estimates[name] = estimate(statistic, populations, resamples=resamples, seed=seed)
    return Result(spec, estimates, confusions(own), fit_s)


def learn(router: Router, spec: RouterSpec, far: float, tell: Tell) -> Learned:
    """A calibration for a wanted false-accept rate, from held-out samples of what the router serves.

    Raises CalibrationFailed where there is nothing to hold out.
    """
    kind = METHODS[spec.method]
    settings = kind.Settings.model_validate(dict(spec.settings))
    library = router.library
    assert library is not None
    try:
        held = hold_out(kind, settings, library, tell=partial(tell, f"{spec.name}: calibration"))
        found, _ = calibrate(held, fitted(kind, library, settings), settings, far=far, encoder=router.encoder_id)
    except ValueError as error:
        raise CalibrationFailed(f"{spec.name}: {error}") from error
    kept = {spec.method: found.model_dump(mode="json")}
    return Learned(Content(number=1, created_at=datetime.now(UTC), calibration=kept))


def outcomes(prompts: Sequence[Prompt], decisions: Sequence[Decision]) -> Outcomes:
    """The decisions must list all candidates."""
    ranked = [[candidate.expert for candidate in decision.candidates] for decision in decisions]
    return Outcomes(
        task=tuple(task for task, _ in prompts),
        rank=np.array(
            [names.index(task) + 1 if task in names else 0 for (task, _), names in zip(prompts, ranked, strict=True)],
            np.int64,
        ),
        best=tuple(names[0] if names else None for names in ranked),
        margin=np.array([_margin(decision) for decision in decisions], np.float64),
        confidence=np.array([decision.confidence for decision in decisions], np.float64),
        answered=np.array([decision.kind != "base" for decision in decisions], bool),
    )


def _margin(decision: Decision) -> float:
    best = decision.candidates[0].score if decision.candidates else -np.inf
    return best - (decision.threshold or 0.0)


def timings(router: Router, prompts: Sequence[Prompt]) -> metrics.Floats:
    """Milliseconds to a decision, for prompts that are spread evenly over all of these, one at a time."""
    spread = np.linspace(0, len(prompts) - 1, min(TIMED, len(prompts))).astype(int)
    texts = [prompts[n][1] for n in spread]
    for text in texts[:WARM_UP]:
        router.route_sync(text)
    return np.array([router.route_sync(text).timings["total"] for text in texts], np.float64)


Figure = tuple[Callable[..., float], Sequence[Groups]]


def figures_of(own: Outcomes, other: Outcomes, clusters: Mapping[str, str]) -> dict[str, Figure]:
    """Every figure, as a function of rows, and the prompts whose rows it takes."""
    tests, strangers = Groups(own.task), Groups([task or n for n, task in enumerate(other.task)])
    cluster = {task: clusters.get(task, task) for task in {*own.task, *own.best, *clusters} if task is not None}
    near = np.array(
        [best is not None and cluster[task] == cluster[best] for task, best in zip(own.task, own.best, strict=True)]
    )
    right = (own.rank == 1) & own.answered
    margins = _ranked(np.concatenate([own.margin, other.margin]))
    mine, theirs = np.split(margins, [len(own.task)])

    figures: dict[str, Figure] = {
        "top1": (lambda rows: metrics.top(own.rank[rows], 1), [tests]),
        "top3": (lambda rows: metrics.top(own.rank[rows], 3), [tests]),
        "mrr": (lambda rows: metrics.reciprocal_rank(own.rank[rows]), [tests]),
    }
    if clusters:
        figures["cluster_top1"] = (lambda rows: float(near[rows].mean()), [tests])
    figures["routed"] = (lambda rows: float(right[rows].mean()), [tests])
    figures["abstained"] = (lambda rows: float(1 - own.answered[rows].mean()), [tests])
    if len(strangers):
        figures["auroc"] = (lambda rows, others: metrics.auroc(mine[rows], theirs[others]), [tests, strangers])
        figures["fpr95"] = (
            lambda rows, others: metrics.false_positives(mine[rows], theirs[others]),
            [tests, strangers],
        )
        figures["false_accepts"] = (lambda others: float(other.answered[others].mean()), [strangers])
        figures["ece"] = (
            lambda rows, others: calibration_error(
                np.concatenate([own.confidence[rows], other.confidence[others]]),
                np.concatenate([right[rows], ~other.answered[others]]),
            ),
            [tests, strangers],
        )
    else:
        figures["ece"] = (lambda rows: calibration_error(own.confidence[rows], right[rows]), [tests])
    return figures


def _percentile(values: metrics.Floats, percent: float) -> Figure:
    return lambda rows: float(np.percentile(values[rows], percent)), [Groups(range(len(values)))]


def _ranked(values: metrics.Floats) -> metrics.Floats:
    """(n,) -> (n,) in the same order, but finite."""
    return np.unique(values, return_inverse=True)[1].astype(np.float64)


def confusions(own: Outcomes) -> tuple[tuple[str, str | None, int], ...]:
    wrong = Counter((task, best) for task, best, rank in zip(own.task, own.best, own.rank, strict=True) if rank != 1)
    ordered = sorted(wrong.items(), key=lambda item: (-item[1], item[0][0], item[0][1] or ""))
    return tuple((task, best, count) for (task, best), count in ordered)
