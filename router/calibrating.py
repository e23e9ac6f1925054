"""Calibration: so that `confidence` is the probability of being right, and a threshold lets through what was asked for.

From held-out prompts (`router.held_out`), in this order:

shift        what is added to every expert's threshold, so that at most the wanted share of prompts out of domain is
             answered by an expert (the false-accept rate): a split-conformal quantile of how far they exceed it
temperature  minimises the negative log-likelihood of softmax([scores, threshold] / T), the base model being right
             about prompts out of domain (Guo et al. 2017)
curves       isotonic regression of being right on that softmax's largest value, one for prompts that an expert
             answers and one for those left to the base model (Zadrozny and Elkan 2002)
sets         the nonconformity of held-out prompts' own experts (`router.conformal`)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from router.calibration import Calibration, Curve
from router.conformal import nonconformity, quantile, softmax
from router.held_out import Floats, HeldOut
from router.method import Method, MethodSettings

Booleans = NDArray[np.bool_]

#: Decisions that an isotonic curve needs; with fewer, the temperature alone is used.
ENOUGH = 100
#: Most nonconformities that are kept.
KEPT = 1000
BINS = 10


@dataclass(frozen=True)
class Report:
    """Shares in [0, 1], before and after, each measured on prompts that the calibration was not fitted to.

    prompts, outside  held-out prompts of experts, and prompts out of domain
    right             of the former, the best score is the right expert's
    ece               expected calibration error: mean distance between confidence and accuracy
    far               of prompts out of domain, answered by an expert; NaN without any
    lost              of prompts whose best score is the right expert's, left to the base model
    """

    prompts: int
    outside: int
    right: float
    ece_before: float
    ece_after: float
    far_before: float
    far_after: float
    lost_before: float
    lost_after: float


@dataclass(frozen=True, eq=False)
class Outcome:
    """Of N decisions, all (N,): confidence, whether an expert answered, whether the decision was right."""

    confidence: Floats
    answered: Booleans
    right: Booleans


def calibrate(
    held: HeldOut, method: Method, settings: MethodSettings, *, far: float, share: float = 0.1, encoder: str = ""
) -> tuple[Calibration, Report]:
    """A calibration and what it is worth. Of the method only its temperature is read, and whether it ever abstains.

    `far` is the wanted false-accept rate; `share`, of all prompts those expected to be out of domain, weighs them.
    Raises ValueError when nothing could be held out.
    """
    if not (held.own >= 0).any():
        raise ValueError("No expert has two samples, so none can be held out to measure with.")
    plain = Calibration(temperature=method.temperature)
    rejects = method.thresholds is not None
    weights = weigh(held, share)

    def fit(which: Booleans) -> Calibration:
        return _fit(held.take(which), weights[which], plain, far if rejects else None)

    before = outcome(held, plain, rejects)
    after = Outcome(before.confidence.copy(), before.answered.copy(), before.right.copy())
    for number in np.unique(held.part):
        here = held.part == number
        found = outcome(held.take(here), fit(~here), rejects)
        after.confidence[here], after.answered[here], after.right[here] = found.confidence, found.answered, found.right
    calibration = fit(np.ones(len(held), bool))
    own, first = held.own >= 0, held.scores.argmax(axis=1) == held.own
    report = Report(
        prompts=int(own.sum()),
        outside=int((~own).sum()),
        right=float(first[own].mean()),
        ece_before=calibration_error(before.confidence, before.right, weights),
        ece_after=calibration_error(after.confidence, after.right, weights),
        far_before=_mean(before.answered[~own]),
        far_after=_mean(after.answered[~own]),
        lost_before=_mean(~before.answered[first]),
        lost_after=_mean(~after.answered[first]),
    )
    return calibration.model_copy(update={"settings": settings.model_dump_json(), "encoder": encoder}), report


def weigh(held: HeldOut, share: float) -> Floats:
    """(N,) weights with which prompts out of domain make up this share of all."""
    outside = held.own < 0
    if not outside.any():
        return np.ones(len(held))
    each = share / (1 - share) * (~outside).sum() / outside.sum()
    return np.where(outside, each, 1.0)


def outcome(held: HeldOut, calibration: Calibration, rejects: bool = True) -> Outcome:
    """What would be decided, as `router.method.decide` does it."""
    best = held.scores.max(axis=1)
    limits = held.limits + calibration.shift
    answered = best >= limits if rejects else np.ones(len(held), bool)
    raw = softmax(_options(held, limits, rejects), calibration.temperature).max(axis=1)
    confidence = np.empty(len(held))
    for which, curve in ((answered, calibration.answered), (~answered, calibration.abstained)):
        confidence[which] = raw[which] if curve is None else curve.at(raw[which])
    right = np.where(answered, held.scores.argmax(axis=1) == held.own, held.own < 0)
    return Outcome(confidence, answered, right)


def threshold_shift(excess: Floats, far: float) -> float:
    """What to add to thresholds so that of prompts out of domain, which exceeded theirs by this much (M,), at most
    the share `far` still does: with exchangeable prompts a new one does with at most that probability.
    """
    limit = quantile(excess, far)
    return float(np.nextafter(limit if math.isfinite(limit) else excess.max(initial=0.0), math.inf))


def calibration_error(confidence: Floats, right: Booleans, weights: Floats | None = None) -> float:
    """Expected calibration error: mean distance between confidence and accuracy over `BINS` bins of confidence."""
    weights = np.ones(len(confidence)) if weights is None else weights
    of = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(of, weights * (confidence - right), minlength=BINS)
    return float(np.abs(gaps).sum() / weights.sum())


def _fit(held: HeldOut, weights: Floats, plain: Calibration, far: float | None) -> Calibration:
    """`far` is None for methods that never abstain."""
    own = held.own >= 0
    shift = 0.0
    if far is not None and not own.all():
        shift = threshold_shift((held.scores.max(axis=1) - held.limits)[~own], far)
    temperature = _temperature(held, weights, shift, plain.temperature, far is not None)
    uncurved = plain.model_copy(update={"shift": shift, "temperature": temperature})
    raw = outcome(held, uncurved, far is not None)
    mine = nonconformity(softmax(held.scores[own], temperature))[np.arange(own.sum()), held.own[own]]
    return uncurved.model_copy(
        update={
            "answered": _isotonic(raw, raw.answered, weights),
            "abstained": _isotonic(raw, ~raw.answered, weights),
            "nonconformity": _thinned(mine),
        }
    )


def _temperature(held: HeldOut, weights: Floats, shift: float, start: float, rejects: bool) -> float:
    """The likeliest, within a factor of 100 of the method's own."""
    from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]

    options = _options(held, held.limits + shift, rejects)  # (N, n + 1): the base model is the last
    asked = np.isfinite(options[np.arange(len(held)), held.own]) if rejects else held.own >= 0
    options, own, weights = options[asked], held.own[asked], weights[asked]
    options = options - options.max(axis=1, keepdims=True)

    def loss(log_temperature: float) -> float:
        logits = options / math.exp(log_temperature)
        each = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(own)), own]
        return float((weights * each).sum())

    middle = math.log(start)
    found = minimize_scalar(loss, bounds=(middle - math.log(100), middle + math.log(100)), method="bounded")
    return float(math.exp(found.x))


def _options(held: HeldOut, limits: Floats, rejects: bool) -> Floats:
    """(N, n) scores and, for methods that abstain, the threshold as the base model's, (N, n + 1)."""
    return np.column_stack([held.scores, limits]) if rejects else held.scores


def _isotonic(raw: Outcome, which: Booleans, weights: Floats) -> Curve | None:
    """Never quite 0 or 1: that would claim more than so many prompts can show."""
    if which.sum() < ENOUGH:
        return None
    from sklearn.isotonic import IsotonicRegression  # type: ignore[import-untyped]

    least = 1 / (which.sum() + 2)
    fitted = IsotonicRegression(y_min=least, y_max=1 - least, out_of_bounds="clip")
    fitted.fit(raw.confidence[which], raw.right[which], weights[which])
    return Curve(x=tuple(fitted.X_thresholds_.tolist()), y=tuple(fitted.y_thresholds_.tolist()))


def _thinned(values: Floats) -> tuple[float, ...]:
    """At most `KEPT` of them, in order, each standing for itself and those under it: sets only grow."""
    ordered = np.sort(values)
    if len(ordered) > KEPT:
        ordered = ordered[np.ceil(np.arange(1, KEPT + 1) * len(ordered) / KEPT).astype(int) - 1]
    return tuple(ordered.round(9).tolist())


def _mean(flags: Booleans) -> float:
    return float(flags.mean()) if len(flags) else math.nan
