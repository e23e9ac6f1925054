"""Whom a version changes: whose samples the router would give it, and how well they would be answered then."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from adapters_registry.expert import Expert, Sample
from router.joining import Joining, Moved, Row
from serving.checks.own_task import Score
from serving.checks.report import MOST_ROWS, Section, listed

#: Samples of others that are asked of those who answer them, before and after.
MOST_MOVED = 200


def confusion(joined: Joining, max_confusion: float) -> Section:
    """The figure is the largest share of one other expert's samples that it answers now and the version would; one
    sample of a few proves nothing.
    """
    changed = [row for row in joined.rows if row.lost or row.elsewhere or row.abstained or row.gained]
    changed.sort(key=lambda row: (-taken(row), -row.lost, row.expert))
    figure = max(map(taken, changed), default=0.0)
    losers = [f"'{row.expert}' {row.lost} of {row.samples}" for row in changed if row.lost]
    if not joined.asked:
        detail = "there are no samples of other experts to compare with"
    else:
        detail = f"takes {joined.lost} of {joined.asked} held-out samples of other experts"
        detail += f": {listed(losers)}" if losers else ""
        detail += f"; {joined.top1_before:.1%} go to their own expert without it, {joined.top1_after:.1%} with it"
    if joined.own:
        reached = sum(each.after == joined.name for each in joined.own)
        detail += f"; of its own {len(joined.own)} samples it would get {reached}"
    return Section(
        name="confusion",
        passed=figure <= max_confusion,
        figure=round(figure, 6),
        limit=max_confusion,
        detail=detail,
        rows=tuple(
            {
                "expert": row.expert,
                "samples": row.samples,
                "own_before": row.right_before,
                "own_after": row.right_after,
                "to_this_version": row.lost,
                "to_another": row.elsewhere,
                "to_the_base_model": row.abstained,
            }
            for row in changed[:MOST_ROWS]
        ),
    )


def taken(row: Row) -> float:
    return row.lost / row.samples if row.lost > 1 else 0.0


@dataclass(frozen=True)
class Regression:
    """version   that is checked
    moved     samples of others that it would answer
    asked     of each expert, how many of the samples that were routed have an answer, about
    experts  the others by name
    left_out  moved samples that are too many to be asked
    """

    version: Expert
    moved: Sequence[tuple[Moved, Sample]]
    asked: Mapping[str, float]
    experts: Mapping[str, Expert]
    left_out: int = 0

    @classmethod
    def of(cls, version: Expert, joined: Joining, experts: Mapping[str, Expert]) -> Regression:
        """Of too many, some of every expert's."""
        by_expert: dict[str, list[tuple[Moved, Sample]]] = defaultdict(list)
        for each in joined.moved:
            if each.after == version.name and each.before != version.name and each.expert in experts:
                by_expert[each.expert].append((each, experts[each.expert].samples[each.sample]))
        turns = chain.from_iterable(zip_longest(*by_expert.values()))
        moved = [each for each in turns if each is not None]
        asked = {
            row.expert: row.samples * answered(experts[row.expert]) for row in joined.rows if row.expert in experts
        }
        return cls(version, moved[:MOST_MOVED], asked, experts, max(0, len(moved) - MOST_MOVED))

    def pairs(self) -> Iterator[tuple[Expert | None, Sample]]:
        """Who is to be asked for what."""
        for each, sample in self.moved:
            yield self._before(each), sample
            yield self.version, sample

    def _before(self, moved: Moved) -> Expert | None:
        return None if moved.before is None else self.experts[moved.before]

    def section(self, score: Score, max_regression: float) -> Section:
        """The figure is the largest drop of an expert's mean score over its samples with answers."""
        if not self.moved:
            detail = "no sample of another expert would move to it"
            return Section(name="regression", passed=True, figure=0.0, limit=max_regression, detail=detail)
        scored: dict[str, list[tuple[float, float]]] = defaultdict(list)
        for each, sample in self.moved:
            before, after = score(self._before(each), sample), score(self.version, sample)
            if before is not None and after is not None:
                scored[each.expert].append((before, after))
        if not scored:
            detail = f"not measured: none of the {len(self.moved)} samples that would move to it has an answer"
            return Section(name="regression", passed=None, detail=detail)
        drops = {
            name: (sum(before for before, _ in found) - sum(after for _, after in found)) / max(self.asked[name], 1)
            for name, found in scored.items()
        }
        figure = round(max(0.0, *drops.values()), 6)
        return Section(
            name="regression",
            passed=figure <= max_regression,
            figure=figure,
            limit=max_regression,
            detail=self._told(scored, drops),
            rows=tuple(
                {
                    "expert": name,
                    "samples": round(self.asked[name]),
                    "moved": len(scored[name]),
                    "right_before": int(sum(before for before, _ in scored[name])),
                    "right_after": int(sum(after for _, after in scored[name])),
                    "change": round(-drop, 6),
                }
                for name, drop in sorted(drops.items(), key=lambda each: (-each[1], each[0]))[:MOST_ROWS]
            ),
        )

    def _told(self, scored: Mapping[str, Sequence[tuple[float, float]]], drops: Mapping[str, float]) -> str:
        pairs = [pair for found in scored.values() for pair in found]
        before, after = (int(sum(column)) for column in zip(*pairs, strict=True))
        told = f"of {len(pairs)} samples of others that would move to it, {before} are answered exactly now, "
        told += f"{after} with it"
        worse = sorted((name for name in drops if drops[name] > 0), key=lambda name: -drops[name])
        if worse:
            losers = [f"'{name}' ({drops[name]:.0%} of its samples)" for name in worse]
            told += f"; worse for {listed(losers)}"
        if unanswered := len(self.moved) - len(pairs):
            told += f"; {unanswered} more have no answer to compare with"
        return told + (f"; {self.left_out} were not asked" if self.left_out else "")


def answered(expert: Expert) -> float:
    """Share of the samples that have an answer."""
    return sum(sample.answer is not None for sample in expert.samples) / max(len(expert.samples), 1)
