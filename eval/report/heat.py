"""Heat maps: a grid of figures as colours, with the figures in the cells where there is room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from eval.report.drawing import INK, MUTED, PAPER, RULE, new_figure, short, svg
from eval.report.figures import Floats, Grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

WIDTH = 780  # points, at most
ROW = 15
LETTER = 4.9  # mean width of one, points
ROOM = 21  # a cell that a figure fits into

Kind = Literal["score", "share"]


def heat_map(
    grid: Grid, name: str, alt: str, *, label: str, kind: Kind = "score", rows: str = "", columns: str = ""
) -> str:
    """`score`: from 0 to 1 (or to the largest) on a scale of colours; `share`: from nothing to all of one colour.

    `label` names the figure, `rows` and `columns` what is in them. Own cells have a frame.
    """
    left = LETTER * max([len(short(each)) for each in grid.rows] + [8]) + 14
    widest = LETTER * max([len(short(each, 26)) for each in grid.columns], default=0)
    cell = min(42.0, max(9.0, (WIDTH - left - 12) / len(grid.columns)))
    upright = widest > cell - 3
    top = (widest if upright else 10) + 12 + (14 if columns else 0)
    below = 40
    width, height = left + cell * len(grid.columns) + 12, top + ROW * len(grid.rows) + below
    width = max(width, left + 150 + LETTER * len(label))
    figure = new_figure(width, height)
    axes = figure.add_axes(
        (left / width, below / height, cell * len(grid.columns) / width, ROW * len(grid.rows) / height)
    )
    image = _cells(axes, grid, kind)
    _labels(axes, grid, upright, rows, columns, top)
    if cell >= ROOM:
        _figures(axes, grid.values, kind, image)
    bar = figure.add_axes((left / width, 22 / height, 120 / width, 6 / height))
    low, high = image.get_clim()
    scale = figure.colorbar(image, cax=bar, orientation="horizontal", ticks=[low, high])
    scale.outline.set_visible(False)
    bar.set_xticklabels([f"{low:.3g}", f"{high:.3g}"])
    bar.text(1.08, 0.5, label, transform=bar.transAxes, va="center")
    return svg(figure, name, alt)


def _cells(axes: Axes, grid: Grid, kind: Kind) -> AxesImage:
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    shades = LinearSegmentedColormap.from_list("share", [(0.0, 0.447, 0.698, 0.0), (0.0, 0.447, 0.698, 1.0)])
    values = grid.values[~np.isnan(grid.values)]
    most, least = float(values.max(initial=-np.inf)), float(values.min(initial=0.0))
    image = axes.imshow(
        grid.values,
        cmap=shades if kind == "share" else colormaps["viridis"],
        vmin=least,
        vmax=1.0 if most <= 0 or (most <= 1 and kind == "score") else most,
        aspect="auto",
        interpolation="nearest",
    )
    rows, columns = grid.values.shape
    line = PAPER if kind == "score" else RULE
    axes.hlines(np.arange(rows + 1) - 0.5, -0.5, columns - 0.5, colors=line, linewidths=0.8)
    axes.vlines(np.arange(columns + 1) - 0.5, -0.5, rows - 0.5, colors=line, linewidths=0.8)
    for row, column in grid.own:
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=INK, linewidth=1.3))
    for row, column in np.argwhere(np.isnan(grid.values)):
        axes.plot(column, row, marker=".", markersize=1.5, color=MUTED)
    return image


def _labels(axes: Axes, grid: Grid, upright: bool, rows: str, columns: str, top: float) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False, pad=4)
    axes.set_yticks(range(len(grid.rows)), [short(each) for each in grid.rows])
    names = [short(each, 26) for each in grid.columns]
    axes.set_xticks(range(len(names)), names, rotation=90 if upright else 0)
    axes.set_xlim(-0.5, len(grid.columns) - 0.5)
    axes.set_ylim(len(grid.rows) - 0.5, -0.5)
    if columns:
        for text, x, y, align in ((columns, 0, top - 11, "left"), (rows, -4, 4, "right")):
            axes.annotate(text, (0, 1), (x, y), "axes fraction", textcoords="offset points", ha=align, color=MUTED)


def _figures(axes: Axes, values: Floats, kind: Kind, image: AxesImage) -> None:
    low, high = image.get_clim()
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value) or (kind == "share" and value < 0.005):
            continue
        red, green, blue, alpha = image.cmap(float((value - low) / (high - low or 1)))
        light = 0.3 * red + 0.59 * green + 0.11 * blue > 0.5
        colour = (INK if alpha < 0.6 else "#ffffff") if kind == "share" else "#111111" if light else "#ffffff"
        axes.text(column, row + 0.03, cell(value), color=colour, ha="center", va="center", fontsize=7.5)


def cell(value: float) -> str:
    """Two digits: `.87`, `1`, `-3.2`."""
    if abs(value) >= 9.95:
        return f"{value:.0f}".replace("-", "\N{MINUS SIGN}")
    text = f"{value:.2f}" if abs(value) < 0.995 else f"{value:.1f}".removesuffix(".0")
    return text.replace("0.", ".", 1).replace("-", "\N{MINUS SIGN}").replace(".00", "0")


def strips(prompts: Sequence[tuple[str, tuple[int, ...]]], experts: Sequence[str], name: str, alt: str) -> str:
    """Tokens from left to right, coloured by expert; a row to a prompt. Beyond the most used seven: "others"."""
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Patch

    from eval.report.drawing import SERIES

    used = [token for _, tokens in prompts for token in tokens]
    order = sorted(set(used), key=lambda each: (-used.count(each), each))[: len(SERIES)]
    left = LETTER * max(len(short(text, 34)) for text, _ in prompts) + 14
    most = max((len(tokens) for _, tokens in prompts), default=1) or 1
    legend = 14 * (-(-(len(order) + 1) // 4)) + 4
    width, height = WIDTH, ROW * len(prompts) + legend + 34
    figure = new_figure(width, height)
    axes = figure.add_axes((left / width, 30 / height, (width - left - 12) / width, ROW * len(prompts) / height))
    for row, (_, tokens) in enumerate(prompts):
        for start, stop, expert in _runs(tokens):
            colour = SERIES[order.index(expert)] if expert in order else RULE
            axes.barh(row, stop - start, left=start, height=0.72, color=colour)
    axes.set_xlim(0, most)
    axes.set_ylim(len(prompts) - 0.5, -0.5)
    axes.set_yticks(range(len(prompts)), [short(text, 34) for text, _ in prompts])
    axes.spines[["left"]].set_visible(False)
    axes.set_xlabel("token, in order (prompt, then answer)")
    handles = [Patch(color=SERIES[k], label=short(experts[expert], 24)) for k, expert in enumerate(order)]
    if len(set(used)) > len(order):
        handles.append(Patch(color=to_rgba(RULE), label=f"{len(set(used)) - len(order)} others"))
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(left / width, 1), ncols=4, borderaxespad=0)
    return svg(figure, name, alt)


def _runs(tokens: Sequence[int]) -> list[tuple[int, int, int]]:
    """(start, stop, expert) of neighbours that are alike."""
    runs: list[tuple[int, int, int]] = []
    for place, expert in enumerate(tokens):
        if runs and runs[-1][2] == expert:
            runs[-1] = (runs[-1][0], place + 1, expert)
        else:
            runs.append((place, place + 1, expert))
    return runs
