"""Dots, intervals and curves: scores by regime, differences to the baseline, abstention, quality against latency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eval.records import Regime
from eval.report.drawing import DASHES, INK, MARKERS, MUTED, PAPER, RULE, SERIES, new_figure, short, svg
from eval.report.figures import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 700  # points
ROW = 16
LETTER = 4.9


@dataclass(frozen=True)
class Dot:
    """A figure of a row with its interval; `strong`: to be seen first; `beside`: another figure, for a second panel."""

    name: str
    value: float
    low: float
    high: float
    reference: bool = False
    strong: bool = True
    beside: float | None = None
    place: int | None = None


@dataclass(frozen=True)
class Point:
    """A router: what it scores, with its interval, and how long an answer takes (milliseconds)."""

    name: str
    score: float
    low: float
    high: float
    ms: float
    reference: bool = False
    front: bool = False


def scores(rows: Sequence[str], regimes: Mapping[Regime, Mapping[str, Dot]], name: str, alt: str) -> str:
    """A row to a router, a mark with its interval to a regime; rows as they are given, the best first."""
    references = {dot.name for dots in regimes.values() for dot in dots.values() if dot.reference}
    row = max(ROW, 6 * len(regimes) + 4)
    left = _margin(rows)
    width, height = WIDTH, row * len(rows) + 62
    figure = new_figure(width, height)
    axes = figure.add_axes((left / width, 34 / height, (width - left - 16) / width, row * len(rows) / height))
    for k, (regime, dots) in enumerate(regimes.items()):
        shift = (k - (len(regimes) - 1) / 2) * 0.24
        shown = [(place + shift, dots[each]) for place, each in enumerate(rows) if each in dots]
        places, values = [place for place, _ in shown], [dot.value for _, dot in shown]
        axes.hlines(places, [d.low for _, d in shown], [d.high for _, d in shown], colors=SERIES[k], linewidths=1)
        axes.plot(values, places, MARKERS[k], color=SERIES[k], markersize=4.5, markeredgewidth=0, label=regime)
    _rows(axes, rows, references)
    axes.set_xlabel("normalised score (1: as good as the oracle), with 95 % interval")
    axes.axvline(1, color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
    figure.legend(loc="upper left", bbox_to_anchor=(left / width, 1), ncols=len(regimes), borderaxespad=0, borderpad=0)
    return svg(figure, name, alt)


def differences(dots: Sequence[Dot], baseline: str, name: str, alt: str) -> str:
    """Left the difference to the baseline with its interval, filled where it excludes 0; right the rank aggregation."""
    left, gap, right = _margin([dot.name for dot in dots]), 22, 150
    width, height = WIDTH, ROW * len(dots) + 64
    tall = ROW * len(dots) / height
    figure = new_figure(width, height)
    axes = figure.add_axes((left / width, 36 / height, (width - left - gap - right - 34) / width, tall))
    beside = figure.add_axes(((width - right - 34) / width, 36 / height, right / width, tall))
    for place, dot in enumerate(dots):
        colour = SERIES[0] if dot.value >= 0 else SERIES[1]
        axes.hlines(place, dot.low, dot.high, colors=colour, linewidths=1.2)
        axes.plot(dot.value, place, "o", color=colour, markersize=5, markerfacecolor=colour if dot.strong else PAPER)
        if dot.beside is not None:
            beside.plot([0, dot.beside], [place, place], color=RULE, linewidth=1, zorder=0)
            beside.plot(dot.beside, place, "D", color=INK, markersize=4, markeredgewidth=0)
        if dot.place is not None:
            beside.text(1.17, place, str(dot.place), ha="right", va="center", color=INK)
    names = [dot.name for dot in dots]
    _rows(axes, names, {dot.name for dot in dots if dot.reference})
    _rows(beside, ["" for _ in names], set())
    axes.axvline(0, color=INK, linewidth=0.9, zorder=0)
    axes.set_xlabel(f"score minus that of {short(baseline, 24)}, 95 % interval")
    beside.set_xlim(0, 1)
    beside.set_xticks([0, 0.5, 1])
    beside.set_xlabel("Borda: others beaten")
    axes.set_title("Difference in the mean", pad=8)
    beside.set_title("Ranks across tasks", pad=8)
    beside.text(1.17, 1, "Kemeny", ha="right", va="bottom", color=MUTED, transform=beside.get_xaxis_transform())
    return svg(figure, name, alt)


def frontier(points: Sequence[Point], name: str, alt: str) -> str:
    """Fast and good is up and left; a line joins those that nobody beats in both."""
    width, height = WIDTH, 380
    figure = new_figure(width, height)
    axes = figure.add_axes((56 / width, 42 / height, (width - 190) / width, (height - 60) / height))
    for point in points:
        colour = MUTED if point.reference else SERIES[0]
        axes.vlines(point.ms, point.low, point.high, colors=colour, linewidths=0.7, alpha=0.5)
        face = colour if point.front else PAPER
        mark = "s" if point.reference else "o"
        axes.plot(point.ms, point.score, mark, color=colour, markersize=6 if point.front else 4.5, markerfacecolor=face)
    front = sorted((point for point in points if point.front), key=lambda each: each.ms)
    xs, ys = [point.ms for point in front], [point.score for point in front]
    axes.step(xs, ys, where="post", color=SERIES[0], linewidth=1, linestyle=(0, (4, 2)), zorder=0)
    axes.set_xscale("log")
    _plain_log(axes)
    axes.grid(True, axis="both", which="major")
    axes.set_axisbelow(True)
    axes.set_xlabel("median latency of an answer, deciding included (ms, logarithmic)")
    axes.set_ylabel("normalised score")
    _named(axes, sorted(points, key=lambda each: (not each.front, each.reference, -each.score)), width, height)
    return svg(figure, name, alt)


def _plain_log(axes: Axes) -> None:
    """Round figures on the axis, at least four where there are so many."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    low, high = axes.get_xlim()
    ticks: Sequence[float] = MaxNLocator(7).tick_values(low, high)
    if high / low > 4:
        for among in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
            ticks = [x for k in range(-3, 9) for m in among if low <= (x := m * 10.0**k) <= high]
            if len(ticks) >= 4:
                break
    axes.xaxis.set_major_locator(FixedLocator([x for x in ticks if low <= x <= high]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 10 else f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _named(axes: Axes, points: Sequence[Point], width: float, height: float) -> None:
    """Names beside their points, the first first; who has no room to the right of it stays without."""
    taken: list[tuple[float, float, float, float]] = []
    spots = [axes.transData.transform((point.ms, point.score)) * 72 / axes.figure.dpi for point in points]
    marks = [(x - 3.5, y - 3.5, x + 3.5, y + 3.5) for x, y in spots]
    for k, (point, (x, y)) in enumerate(zip(points, spots, strict=True)):
        text = short(point.name, 28)
        wide = LETTER * len(text)
        for dx, dy, align in ((6, 0, "left"), (6, 8, "left"), (6, -8, "left"), (-6, 8, "right"), (-6, -8, "right")):
            start = x + dx if align == "left" else x + dx - wide
            box = (start, y + dy - 5, start + wide, y + dy + 5)
            others = [*taken, *(mark for j, mark in enumerate(marks) if j != k)]
            if box[0] > 50 and box[2] < width and not any(_meet(box, other) for other in others):
                axes.annotate(
                    text, (point.ms, point.score), (dx, dy), textcoords="offset points", ha=align, va="center",
                    fontsize=8, color=INK if point.front else MUTED, annotation_clip=False, gid=f"halo-{k}",
                )  # fmt: skip
                taken.append(box)
                break


def _meet(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def coverage(curves: Mapping[str, Curve], named: Sequence[str], name: str, alt: str) -> str:
    """Of every router a curve, from its surest prompt to all that it answers; those `named` in colour."""
    strangers = any(curve.accepted for curve in curves.values())
    lines = -(-len(named) // 3)
    width, height = WIDTH, 300 + 15 * lines
    figure = new_figure(width, height)
    panels = 2 if strangers else 1
    wide = (width - 60 - 62 * (panels - 1) - 16) / panels
    bottom = (46 + 15 * lines) / height
    for k in range(panels):
        axes = figure.add_axes(((54 + k * (wide + 62)) / width, bottom, wide / width, 230 / height))
        for router, curve in curves.items():
            values = curve.accepted if k else curve.score
            if not values:
                continue
            if router in named:
                place = named.index(router)
                look: dict[str, Any] = {
                    "color": SERIES[place],
                    "linestyle": DASHES[place],
                    "label": short(router, 34),
                    "zorder": 3,
                }
                axes.plot(
                    curve.answered[-1], values[-1], MARKERS[place], color=SERIES[place], markersize=4.5, clip_on=False
                )
            else:
                look = {"color": RULE, "linewidth": 1, "zorder": 1}
            axes.plot(curve.answered, values, **look)
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.02, 1.02)
        axes.grid(True)
        axes.set_xlabel("share of prompts that an expert answers")
        axes.set_title("False accepts: answered out of domain" if k else "Mean score of what is answered", pad=7)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    order = sorted(range(len(labels)), key=lambda each: [short(n, 34) for n in named].index(labels[each]))
    figure.legend(
        [handles[each] for each in order], [labels[each] for each in order],
        loc="lower left", bbox_to_anchor=(54 / width, 0), ncols=3, borderaxespad=0, handlelength=3,
    )  # fmt: skip
    return svg(figure, name, alt)


def _rows(axes: Axes, names: Sequence[str], references: set[str]) -> None:
    """A row to a name, from above; every row on a fine rule."""
    axes.set_yticks(range(len(names)), [short(each) for each in names])
    for label, each in zip(axes.get_yticklabels(), names, strict=True):
        label.set_color(MUTED if each in references else INK)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.spines[["left"]].set_visible(False)
    axes.grid(True, axis="both")
    axes.set_axisbelow(True)


def _margin(names: Sequence[str]) -> float:
    return LETTER * max([len(short(each)) for each in names] + [8]) + 16
