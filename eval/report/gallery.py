"""The pictures of a report, each with a sentence that says how to read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np

from eval.asking import Tell
from eval.measuring import KNOW
from eval.records import Run
from eval.report.drawing import SERIES
from eval.report.figures import Gates, Grid, Tally, gates
from eval.report.heat import cell, heat_map, strips
from eval.report.plots import Dot, Point, coverage, differences, frontier, scores
from eval.sections import Row, Section
from eval.table import Table

CONFUSIONS = 16  # routers whose confusion is drawn
STRIPS, TOKENS = 16, 400  # prompts, and tokens of each, whose experts are drawn
LACKS = "† lacks samples: see the table."


@dataclass(frozen=True)
class Picture:
    """`choice`: one of several to choose from, under this name; `grid`: the figures in it, for those who read them."""

    key: str
    title: str
    caption: str
    svg: str
    part: Literal["results", "experts", "gates"] = "results"
    regime: str = ""
    choice: str = ""
    grid: Grid | None = None


def drawn(run: Run, table: Table, tally: Tally, tell: Tell) -> list[Picture]:
    """Everything that there is something to see of, in the order of the page."""
    from eval.report.drawing import drawing

    todo = list(_todo(run, table, tally))
    pictures = []
    with drawing():
        for done, draw in enumerate(todo):
            tell("drawing", done, len(todo))
            picture = draw()
            if picture is not None:
                pictures.append(picture)
    return pictures


Draw = Callable[[], Picture | None]


def _todo(run: Run, table: Table, tally: Tally) -> Iterator[Draw]:
    yield partial(overview, table)
    for section in table.regimes.values():
        yield partial(compared, section, table.baseline)
        yield partial(by_task, section)
        yield partial(latency, section)
        yield partial(sureness, section, tally)
    yield partial(matrix, tally.matrix())
    inside = table.regimes.get("in-distribution")
    for row in best(inside)[:CONFUSIONS] if inside else []:
        yield partial(confused, row, tally.confusion(row.name))
    for found in gates(run):
        yield partial(gated, found)
        yield partial(by_token, found)


def best(section: Section) -> list[Row]:
    """Routers, the highest normalised score first."""
    rows = [row for row in section.rows if row.router.kind == "router"]
    return sorted(rows, key=lambda row: -_value(row, "normalised", -1.0))


def _value(row: Row, name: str, otherwise: float) -> float:
    figure = row.figures.get(name)
    return otherwise if figure is None or np.isnan(figure.value) else figure.value


def overview(table: Table) -> Picture | None:
    short_of = {row.name for section in table.regimes.values() for row in section.rows if lacks(row)}
    regimes = {
        regime: {
            called(row, row.name in short_of): Dot(
                called(row, row.name in short_of), figure.value, figure.low, figure.high, row.router.kind == "reference"
            )
            for row in section.rows
            if (figure := row.figures.get("normalised")) and not np.isnan(figure.value)
        }
        for regime, section in table.regimes.items()
    }
    rows = list(dict.fromkeys(name for dots in regimes.values() for name in dots))
    if not rows:
        return None
    rows.sort(key=lambda name: [-dots[name].value if name in dots else 9.0 for dots in regimes.values()])
    caption = said(
        """A mark is a router's normalised score in one regime, the line its 95 % interval: the further right, the
        nearer to the oracle, which has 1. References are in grey.""",
        LACKS if short_of else "",
    )
    return Picture("overview", "Every router in every regime", caption, scores(rows, regimes, "overview", caption))


def compared(section: Section, baseline: str) -> Picture | None:
    rows = [row for row in section.rows if row.difference and not np.isnan(row.difference.estimate.value)]
    if not rows:
        return None
    dots = [
        Dot(called(row), told.estimate.value, told.estimate.low, told.estimate.high, row.router.kind == "reference",
            bool(told.mark), row.borda, row.kemeny_place)
        for row in rows if (told := row.difference)
    ]  # fmt: skip
    dots.sort(key=lambda dot: -dot.value)
    exact = "" if section.exact else " (the best ranking that was found in the time)"
    caption = said(
        f"""Left, how much more than {baseline} a router scores on the same prompts, with the 95 % interval, filled
        where it is significant after correction for the number of routers. Right, the share of other rows that it
        beats, task by task ({section.ranked} tasks), and its place in Kemeny's ranking{exact}: where left and right
        disagree, a few tasks make the mean.""",
        note(rows),
    )
    key = f"differences-{section.regime}"
    svg = differences(dots, baseline, key, caption)
    return Picture(key, f"Against {baseline}", caption, svg, regime=section.regime)


def by_task(section: Section) -> Picture | None:
    rows = [row for row in section.rows if row.tasks]
    values = np.array([[row.tasks.get(task, np.nan) for task in section.tasks] for row in rows])
    values = values.reshape(len(rows), len(section.tasks))
    there = ~np.isnan(values)
    kept = there.any(axis=0) & (np.where(there, values, 0).min(axis=0, initial=0) >= 0)
    if not kept.any():
        return None
    unbounded = [task for task, keep in zip(section.tasks, kept, strict=True) if not keep]
    tasks = tuple(task for task, keep in zip(section.tasks, kept, strict=True) if keep)
    grid = Grid(tuple(called(row) for row in rows), tasks, values[:, kept])
    caption = said(
        """A row is a router, a column a task in its own metric: a dark column is hard for everybody, a dark cell in a
        light column is a router that fails there.""",
        not_shown(unbounded),
        note(rows),
    )
    key = f"tasks-{section.regime}"
    svg = heat_map(grid, key, caption, label="mean score", rows="router", columns="task")
    return Picture(key, "Score by task", caption, svg, regime=section.regime, grid=grid)


def latency(section: Section) -> Picture | None:
    rows = [row for row in section.rows if _value(row, "normalised", -1) >= 0 and _value(row, "p50_ms", 0) > 0]
    if len(rows) < 2:
        return None
    figures = [(row, row.figures["normalised"], row.figures["p50_ms"].value) for row in rows]
    servable = [(ms, score.value) for row, score, ms in figures if row.name not in KNOW]
    points = [
        Point(called(row), score.value, score.low, score.high, ms, row.router.kind == "reference",
              row.name not in KNOW and _on_front(ms, score.value, servable))
        for row, score, ms in figures
    ]  # fmt: skip
    caption = said(
        """Up is better, left is faster, lines are 95 % intervals of the score. Filled marks on the dashed line are the
        Pareto front: nobody else is better without being slower. References are squares; oracles are not on the front,
        for nobody can serve them.""",
        note(rows),
    )
    key = f"latency-{section.regime}"
    return Picture(key, "Quality against latency", caption, frontier(points, key, caption), regime=section.regime)


def _on_front(ms: float, score: float, among: Sequence[tuple[float, float]]) -> bool:
    """Nobody is as fast and as good, and better in one of the two."""
    return not any(x <= ms and y >= score and (x, y) != (ms, score) for x, y in among)


def sureness(section: Section, tally: Tally) -> Picture | None:
    rows = [row for row in best(section) if tally.abstention(section.regime, row.name)]
    if not rows:
        return None
    found = {called(row): curve for row in rows if (curve := tally.abstention(section.regime, row.name))}
    named = list(found)[: len(SERIES)]
    caption = said(
        """If a router let experts answer only what it is surest of: to the right it is less and less sure, up to the
        mark, which is what it does. Good confidence keeps scores high and false accepts low for long.""",
        f"The best {len(named)} are in colour, of {len(found)}." if len(found) > len(named) else "",
        note(rows),
    )
    key = f"abstention-{section.regime}"
    return Picture(key, "Abstention", caption, coverage(found, named, key, caption), regime=section.regime)


def matrix(grid: Grid) -> Picture | None:
    bounded = np.where(np.isnan(grid.values), 0, grid.values).min(axis=1, initial=0) >= 0
    unbounded = [task for task, keep in zip(grid.rows, bounded, strict=True) if not keep]
    grid = grid.only(bounded)
    if not grid.rows or np.isnan(grid.values).all():
        return None
    caption = said(
        """What every expert scores on every task's prompts, in-distribution: frames mark a task's own expert, and light
        cells beside them experts that can stand in for it.""",
        not_shown(unbounded),
    )
    svg = heat_map(grid, "matrix", caption, label="mean score", rows="task", columns="expert")
    return Picture("matrix", "Experts on tasks", caption, svg, "experts", grid=grid)


def confused(row: Row, grid: Grid) -> Picture | None:
    if np.isnan(grid.values).all():
        return None
    caption = said(
        """Of each task's prompts the share that each expert answered, in-distribution (a blend's experts share by
        weight): colour outside the frames is confusion; a task without a frame is the base model's.""",
        note([row]),
    )
    key = f"confusion-{slug(row.name)}"
    alt = f"{row.name}: {confusions(grid)} {caption}"
    svg = heat_map(
        grid, key, alt, label="share of the task's prompts", kind="share", rows="task", columns="who answered"
    )
    return Picture(key, called(row), caption, svg, "experts", choice=row.name)


def confusions(grid: Grid, most: int = 3) -> str:
    """The largest shares that went to the wrong expert, in words."""
    values = np.nan_to_num(grid.values)
    for row, column in grid.own:
        values[row, column] = 0
    for row in set(range(len(grid.rows))) - {row for row, _ in grid.own}:
        values[row, 0] = 0  # nobody's: the base model is right
    order = np.argsort(-values, axis=None, kind="stable")[:most]
    wrong = [(row, column) for row, column in zip(*np.unravel_index(order, values.shape), strict=True)]
    wrong = [place for place in wrong if values[place] > 0]
    if not wrong:
        return "Every prompt went to the right expert."
    told = ", ".join(
        f"{grid.rows[row]} to {grid.columns[column]} ({cell(values[row, column])})" for row, column in wrong
    )
    return f"Most often wrong: {told}."


def gated(found: Gates) -> Picture:
    rows = tuple(_group(name) for name in found.weights.rows)
    caption = said(
        f"""{found.router}, gate {found.gate}: the mean weight that each group of modules gave each expert, over
        {len(found.tokens)} traced prompts; groups are in the order of computation."""
    )
    key = f"gates-{slug(found.router)}"
    grid = replace(found.weights, rows=rows)
    svg = heat_map(grid, key, caption, label="mean weight", kind="share", rows="layer and modules", columns="expert")
    return Picture(key, f"Gates by layer: {found.router}", caption, svg, "gates", grid=grid)


def by_token(found: Gates) -> Picture | None:
    shown = [(prompt, tokens[:TOKENS]) for prompt, tokens in found.tokens if tokens][:STRIPS]
    if not shown:
        return None
    caption = said(
        """For each token of some prompts and their answers, the expert that had the largest weight over all layers:
        long runs of one colour are a gate that has made up its mind."""
    )
    key = f"tokens-{slug(found.router)}"
    svg = strips(shown, found.weights.columns, key, f"{found.router}. {caption}")
    return Picture(key, f"Gates by token: {found.router}", caption, svg, "gates")


def _group(name: str) -> str:
    """`model.layers.3.self_attn.q_proj+k_proj` is `3 self_attn.q+k`."""
    parts = name.split(".")
    if "layers" in parts[:-2]:
        at = parts.index("layers")
        name = " ".join([parts[at + 1], ".".join(parts[at + 2 :])])
    return name.replace("_proj", "")


def lacks(row: Row) -> str:
    """What a row does not have that a complete one has; "" for nothing."""
    missing = row.counts.get("missing", 0)
    return f"{missing:,} of {row.counts['expected']:,} missing" if missing else ""


def called(row: Row, lacking: bool | None = None) -> str:
    """Its name, marked where samples lack."""
    return f"{row.name} †" if (bool(lacks(row)) if lacking is None else lacking) else row.name


def note(rows: Sequence[Row]) -> str:
    return LACKS if any(map(lacks, rows)) else ""


def not_shown(tasks: Sequence[str]) -> str:
    return f"Not shown, for their scores have no common scale: {', '.join(tasks)}." if tasks else ""


def said(*parts: str) -> str:
    return " ".join(" ".join(parts).split())


def slug(name: str) -> str:
    """Of a name, letters for an id; unlike names stay unlike."""
    return name.encode().hex()
