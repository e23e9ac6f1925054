"""What a version adds: its answers to its own samples, beside those of whoever answers them now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from adapters_registry.expert import Expert, Sample
from serving.checks.report import Cell, Section

#: 1 or 0 for one's answer to a sample; None: there is none. Of experts, None is the base model.
Score = Callable[[Expert | None, Sample], float | None]


@dataclass(frozen=True)
class OwnTask:
    """version  that is checked
    active   the active version of its name, when that is another one
    samples  of its own that are asked and have an answer
    now      of each, who would answer it without the version; None: the base model
    """

    version: Expert
    active: Expert | None
    samples: Sequence[Sample]
    now: Sequence[Expert | None]

    def pairs(self) -> Iterator[tuple[Expert | None, Sample]]:
        """Who is to be asked for what."""
        for sample, serves in zip(self.samples, self.now, strict=True):
            for who in (self.version, None, serves, *([self.active] if self.active else [])):
                yield who, sample

    def section(self, score: Score, min_gain: float) -> Section:
        """The figure is the gain in mean score over the best of: the base model, the active version, and the experts
        that the router sends these prompts to now.
        """
        if not self.samples:
            return Section(name="own_task", passed=None, detail="not measured: no answers among its samples")
        scores = self._scores(score)
        kept = [k for k in range(len(self.samples)) if all(column[k] is not None for column in scores.values())]
        if not kept:
            return Section(name="own_task", passed=None, detail="not measured: its samples could not be asked")
        means = {who: _mean([column[k] for k in kept]) for who, column in scores.items()}
        all_of_them: list[dict[str, Cell]] = [
            {"who": who, "samples": len(kept), "score": round(mean, 6)} for who, mean in means.items()
        ]
        rows = (*all_of_them, *self._served(scores, kept))
        if not any(means.values()):
            detail = f"not measured: nobody gives any of the {len(kept)} answers exactly, this version included"
            return Section(name="own_task", passed=None, detail=detail, rows=rows)
        mine, *others = means.values()
        gain = round(mine - max(others), 6)
        passed = gain >= min_gain and (mine > means[BASE] or mine == 1)
        told = "; ".join(f"{who} {mean:.0%}" for who, mean in means.items())
        detail = f"exact answers to {len(kept)} of its own samples: {told}"
        if mine <= means[BASE] < 1:
            detail += "; it does not better the base model"
        elif not passed:
            detail += f"; a gain of at least {min_gain:+.0%} is asked of it"
        return Section(name="own_task", passed=passed, figure=gain, limit=min_gain, detail=detail, rows=rows)

    def _scores(self, score: Score) -> dict[str, list[float | None]]:
        """By who answers: of each sample."""
        found = {
            THIS: [score(self.version, sample) for sample in self.samples],
            BASE: [score(None, sample) for sample in self.samples],
            NOW: [score(who, sample) for who, sample in zip(self.now, self.samples, strict=True)],
        }
        if self.active is not None:
            found[f"version {self.active.version}, active"] = [score(self.active, sample) for sample in self.samples]
        return found

    def _served(self, scores: Mapping[str, Sequence[float | None]], kept: Sequence[int]) -> Iterator[dict[str, Cell]]:
        """Of whoever answers now: how many of the samples, and how well."""
        serves: dict[str, list[int]] = {}
        for k in kept:
            who = self.now[k]
            serves.setdefault("the base model" if who is None else who.name, []).append(k)
        for name, places in sorted(serves.items(), key=lambda each: (-len(each[1]), each[0])):
            yield {
                "who": f"of these, {name}",
                "samples": len(places),
                "score": round(_mean([scores[NOW][k] for k in places]), 6),
            }


THIS, BASE, NOW = "this version", "the base model", "whoever answers now"


def _mean(scores: Sequence[float | None]) -> float:
    told = [score for score in scores if score is not None]
    return sum(told) / len(told)
