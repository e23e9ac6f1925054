"""What a router makes of experts that come twice, of experts that are in the way, and of their number.

Every trial asks the same test prompts, of one library or of several. What it costs is told beside its control: the same
prompts, without what the trial adds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval import metrics
from eval.asking import Tell
from eval.encodings import Remembering
from eval.intervals import RESAMPLES, Estimate, Groups, estimate
from eval.prompts import Prompts
from eval.routing import Outcomes, RouterSpec, experts_of, figures_of, outcomes
from router.decision import Candidate, Decision
from router.router import Router, RouterSettings

Samples = Mapping[str, tuple[str, ...]]

#: Experts of a library whose number is varied, as far as there are so many.
COUNTS = (5, 17, 50, 150, 500)
#: Distractors for each expert.
TIMES = 10
SHOWN = ("top1", "top3", "routed", "abstained", "false_accepts")
ALL, HALVES, TWICE = "all", "half the samples", "everyone twice"


@dataclass(frozen=True)
class Part:
    """One library, and which of the test prompts are asked of it."""

    samples: Samples
    asked: tuple[int, ...]


@dataclass(frozen=True)
class Trial:
    """parts    ask each test prompt once, all together
    owner    of experts that stand for another one: it is as right that they answer
    control  the trial that this one is to be compared with
    """

    name: str
    parts: tuple[Part, ...]
    owner: Mapping[str, str] = field(default_factory=dict)
    control: str | None = None

    @property
    def experts(self) -> int:
        """In each library."""
        return len(self.parts[0].samples)


@dataclass(frozen=True)
class Row:
    """A trial's figures for one router.

    metrics  SHOWN, and `search_p50_ms`, `search_p95_ms`: of a decision without the encoding
    change   of `routed`, from the control's on the same prompts
    fit_s    seconds that it took to fit a library, on average
    """

    router: str
    trial: str
    experts: int
    libraries: int
    metrics: Mapping[str, Estimate]
    control: str | None
    change: Estimate | None
    fit_s: float

    def json(self) -> dict[str, Any]:
        return {
            "router": self.router,
            "trial": self.trial,
            "experts": self.experts,
            "libraries": self.libraries,
            "metrics": {name: each.json() for name, each in self.metrics.items()},
            "control": self.control,
            "change": self.change.json() if self.change else None,
            "fit_s": self.fit_s,
        }


def trials(
    prompts: Prompts,
    *,
    counts: Sequence[int] = COUNTS,
    times: int = TIMES,
    distractors: Samples | None = None,
    seed: int = 0,
) -> list[Trial]:
    """All of them. `distractors` are experts for other tasks; without any, they are made up of samples of all experts.

    For a number n of experts, those that are tested are divided at random into libraries of n, so that each prompt is
    asked once among n. A library larger than there are such experts has others, then distractors that were given.
    """
    chance = random.Random(seed)
    everything = tuple(range(len(prompts.test)))
    whole = dict(prompts.samples)
    given = {f"{task} (distractor)" if task in whole else task: texts for task, texts in (distractors or {}).items()}
    more = dict(list(given.items())[: times * len(whole)]) or made_up(whole, times * len(whole), chance)
    first, second = halves(whole)
    found = [
        Trial(ALL, (Part(whole, everything),)),
        Trial(HALVES, (Part(first, everything),)),
        Trial(
            TWICE,
            (Part({**first, **second}, everything),),
            owner=dict(zip(second, whole, strict=True)),
            control=HALVES,
        ),
        Trial(f"{len(more)} distractors", (Part({**whole, **more}, everything),), control=ALL),
    ]
    most = len(whole) + len(given)
    varied = sorted({n for n in counts if 1 < n <= most and n != len(whole)})
    found += [Trial(f"{n} experts", tuple(parts(prompts, {**whole, **given}, n, chance)), control=ALL) for n in varied]
    return found


def halves(samples: Samples) -> tuple[Samples, Samples]:
    """Every other sample of each expert, and the others under another name; an only sample is in both."""
    first = {task: texts[::2] for task, texts in samples.items()}
    second = {f"{task} (again)": texts[1::2] or texts for task, texts in samples.items()}
    return first, second


def made_up(samples: Samples, count: int, chance: random.Random) -> Samples:
    """Experts for nothing in particular: each has as many samples as is usual, drawn from those of all."""
    pool = sorted({text for texts in samples.values() for text in texts})
    usual = int(np.median([len(texts) for texts in samples.values()]))
    each = min(max(usual, 1), len(pool))
    names = [f"distractor {k:0{len(str(count))}}" for k in range(1, count + 1)]
    return {name: tuple(chance.sample(pool, each)) for name in names}


def parts(prompts: Prompts, samples: Samples, n: int, chance: random.Random) -> Iterator[Part]:
    """Libraries of n experts in which each task that is tested is asked once."""
    rows: dict[str, list[int]] = {}
    for number, (task, _) in enumerate(prompts.test):
        rows.setdefault(task, []).append(number)
    tested = sorted(rows)
    chance.shuffle(tested)
    for start in range(0, len(tested), n):
        mine = tested[start : start + n]
        others = [task for task in samples if task not in mine]
        # Those that are tested before others, and those of the experts before distractors.
        others.sort(key=lambda task: (task not in rows, task not in prompts.samples, chance.random()))
        kept = sorted([*mine, *others[: n - len(mine)]])
        yield Part({task: samples[task] for task in kept}, tuple(number for task in mine for number in rows[task]))


@dataclass(frozen=True, eq=False)
class Asked:
    """own and other: decisions on the test's prompts and on those out of domain; search_ms of the test's."""

    own: Outcomes
    other: Outcomes
    search_ms: metrics.Floats
    fit_s: float

    @property
    def right(self) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = (self.own.rank == 1) & self.own.answered
        return found


def stress(
    spec: RouterSpec,
    prompts: Prompts,
    encoder: Remembering,
    tried: Sequence[Trial],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    tell: Tell = lambda what, done, total: None,
) -> list[Row]:
    """The router's figures in every trial; a control must come before what is compared with it. Blocks."""
    tests = Groups([task for task, _ in prompts.test])
    known: dict[str, Asked] = {}
    rows = []
    for trial in tried:
        known[trial.name] = asked = ask(spec, prompts, encoder, trial, tell)
        figures = figures_of(asked.own, asked.other, {})
        found = {
            name: estimate(statistic, populations, resamples=resamples, seed=seed)
            for name, (statistic, populations) in figures.items()
            if name in SHOWN
        }
        for percent in (50, 95):
            found[f"search_p{percent}_ms"] = estimate(
                lambda rows, percent=percent, ms=asked.search_ms: float(np.percentile(ms[rows], percent)),
                [Groups(range(len(prompts.test)))],
                resamples=resamples,
                seed=seed,
            )
        change = None
        if trial.control:
            more = asked.right.astype(np.float64) - known[trial.control].right
            change = estimate(lambda rows, more=more: float(more[rows].mean()), [tests], resamples=resamples, seed=seed)
        rows.append(
            Row(spec.name, trial.name, trial.experts, len(trial.parts), found, trial.control, change, asked.fit_s)
        )
    return rows


def ask(spec: RouterSpec, prompts: Prompts, encoder: Remembering, trial: Trial, tell: Tell) -> Asked:
    """Every test prompt of its library; those out of domain are spread over the libraries."""
    decisions: dict[int, Decision] = {}
    foreign: dict[int, Decision] = {}
    fit_s = 0.0
    for number, part in enumerate(trial.parts):
        router = Router(encoder, RouterSettings(method=spec.method, methods={spec.method: dict(spec.settings)}))
        try:
            encoder.prepare([text for texts in part.samples.values() for text in texts])
            started = time.perf_counter()
            router.refresh(experts_of(part.samples, prompts.descriptions))
            fit_s += time.perf_counter() - started
            for n in part.asked:
                tell(f"{spec.name}: {trial.name}", len(decisions), len(prompts.test))
                decisions[n] = under_owners(router.route_sync(prompts.test[n][1], limit=None), trial.owner)
            for n in range(number, len(prompts.ood), len(trial.parts)):
                foreign[n] = router.route_sync(prompts.ood[n][1], limit=None)
        finally:
            router.close()
    ordered = [decisions[n] for n in range(len(prompts.test))]
    return Asked(
        outcomes(prompts.test, ordered),
        outcomes(prompts.ood, [foreign[n] for n in range(len(prompts.ood))]),
        np.array([decision.timings["search"] for decision in ordered], np.float64),
        fit_s / len(trial.parts),
    )


def under_owners(decision: Decision, owner: Mapping[str, str]) -> Decision:
    """With candidates under the names of those that they stand for, each once, at its best place."""
    if not owner:
        return decision
    first: dict[str, Candidate] = {}
    for candidate in decision.candidates:
        name = owner.get(candidate.expert, candidate.expert)
        first.setdefault(name, candidate.model_copy(update={"expert": name}))
    return decision.model_copy(update={"candidates": tuple(first.values())})
