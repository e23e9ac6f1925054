"""The page: what is shown of a run, as plain values for the template."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from eval.intervals import Estimate
from eval.records import RouterInfo, Run
from eval.report.examples import Losses
from eval.report.gallery import Picture, lacks
from eval.sections import FIGURES, LOWER_IS_BETTER, Row, Section
from eval.table import Table
from eval.table_text import incomplete, notes, short

HERE = Path(__file__).parent
MINUS = "\N{MINUS SIGN}"

#: What heads a figure's column, and its unit; figures that are not here are headed by their name.
HEADS = {
    "score": ("Score", ""),
    "normalised": ("Normalised", ""),
    "regret": ("Regret", ""),
    "top1": ("Top\N{NON-BREAKING HYPHEN}1", ""),
    "top3": ("Top\N{NON-BREAKING HYPHEN}3", ""),
    "abstained": ("Abstained", ""),
    "false_accepts": ("False accepts", ""),
    "p50_ms": ("p50", "ms"),
    "p95_ms": ("p95", "ms"),
    "tokens_per_s": ("Tokens", "1/s"),
    "loads": ("Loads", ""),
    "flops": ("FLOPs", "1/token"),
}
JUDGED = ("score", "normalised", "regret", "top1", "top3", "false_accepts", "p50_ms", "p95_ms", "tokens_per_s")
COUNTED = ("p50_ms", "p95_ms", "tokens_per_s", "loads", "flops")  # no shares: shown with as many digits as they need

#: Figures of the page that are no column of `FIGURES`.
FURTHER = {
    "difference": "score minus the baseline's on the same prompts; ▲ better, ▼ worse than it, significant after "
    "correction for the number of routers (sign flips, Benjamini-Hochberg)",
    "borda": "place by the mean over tasks of the share of other rows that a row beats; rows that know the answers are "
    "not ranked",
    "kemeny": "place in the ranking with the fewest disagreements between tasks",
    "prompts": "records with a result, of those that a complete run has",
}


@dataclass(frozen=True)
class Column:
    name: str
    label: str
    unit: str = ""
    lower: bool = False


@dataclass(frozen=True)
class Cell:
    """`sort`: what rows are ordered by; `best` of all routers that could be served."""

    text: str = ""
    sort: float | None = None
    interval: str = ""
    best: bool = False
    mark: str = ""


@dataclass(frozen=True)
class Line:
    """A row of the table; `lacks`: what is not there, in words."""

    router: RouterInfo
    cells: tuple[Cell, ...]
    lacks: str = ""
    baseline: bool = False


@dataclass(frozen=True)
class Shown:
    """A regime's table."""

    regime: str
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...]
    lacking: int


def shown(table: Table, section: Section, run: Run) -> Shown:
    names = [name for name in FIGURES if any(name in row.figures for row in section.rows)]
    columns = [Column(name, *HEADS.get(name, (name, "")), name in LOWER_IS_BETTER) for name in names]
    best = {name: _best(section.rows, name) for name in names}
    lines = [
        Line(
            row.router,
            tuple(_cells(row, names, best)),
            lacks(row),
            row.name == table.baseline,
        )
        for row in section.rows
    ]
    infos = {info.name: info for info in run.routers}
    lines += [Line(infos[name], (), "no records at all") for name in section.absent if name in infos]
    extra = [
        Column("difference", "Difference"),
        Column("borda", "Borda", lower=True),
        Column("kemeny", "Kemeny", lower=True),
    ]
    columns = [*columns[:2], *extra, *columns[2:], Column("prompts", "Prompts")]
    lacking = sum(bool(line.lacks) for line in lines)
    return Shown(section.regime, tuple(columns), tuple(lines), tuple(notes(table, section)), lacking)


def _best(rows: Iterable[Row], name: str) -> float | None:
    """The best value of complete rows that are no reference."""
    values = [
        row.figures[name].value
        for row in rows
        if name in row.figures
        and row.router.kind == "router"
        and not lacks(row)
        and math.isfinite(row.figures[name].value)
    ]
    if name not in JUDGED or len(set(values)) < 2:
        return None
    return (min if name in LOWER_IS_BETTER else max)(values)


def _cells(row: Row, names: Sequence[str], best: Mapping[str, float | None]) -> Iterator[Cell]:
    servable = row.router.kind == "router" and not lacks(row)
    figures = [_figure(name, row.figures.get(name), best[name] if servable else None) for name in names]
    yield from figures[:2]
    told = row.difference
    if told is None or not math.isfinite(told.estimate.value):
        yield Cell()
    else:
        each = told.estimate
        interval = _ends(_share(each.low), _share(each.high))
        yield Cell(_share(each.value, "+"), each.value, interval, mark=told.mark)
    for place in (row.borda_place, row.kemeny_place):
        yield Cell(str(place), place) if place else Cell()
    yield from figures[2:]
    answered, expected = row.counts.get("answered", 0), row.counts.get("expected", 0)
    yield Cell(f"{answered:,}" if answered == expected else f"{answered:,} of {expected:,}", answered)


def _figure(name: str, figure: Estimate | None, best: float | None) -> Cell:
    if figure is None or not math.isfinite(figure.value):
        return Cell()
    told = _count if name in COUNTED else _share
    interval = (
        "" if figure.low == figure.high or name in ("loads", "flops") else _ends(told(figure.low), told(figure.high))
    )
    return Cell(told(figure.value), figure.value, interval, best is not None and figure.value == best)


def _ends(low: str, high: str) -> str:
    """Short enough to stand under their figure: without the 0 before the point."""
    return f"[{', '.join(text.replace('0.', '.') if abs(_number(text)) < 1 else text for text in (low, high))}]"


def _number(text: str) -> float:
    try:
        return float(text.replace(MINUS, "-").replace(",", ""))
    except ValueError:  # with a prefix: `2.21 G`
        return 1.0


def _share(value: float, sign: str = "") -> str:
    return f"{value:{sign}.3f}".replace("-", MINUS) if round(value, 3) else "0.000"


def _count(value: float) -> str:
    return short(value) if abs(value) >= 10_000 else f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def definitions(table: Table) -> list[tuple[str, str]]:
    used = {name for section in table.regimes.values() for row in section.rows for name in row.figures}
    heads = {name: HEADS.get(name, (name, "")) for name in FIGURES}
    told = [
        (f"{label} ({unit})" if unit else label, FIGURES[name]) for name, (label, unit) in heads.items() if name in used
    ]
    return [*told, *((name.capitalize(), text) for name, text in FURTHER.items())]


def settings(run: Run) -> list[tuple[str, str]]:
    """Every setting of the run on a line, nested ones by their path."""
    return list(_flat(run.settings))


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple) and value:
        yield path, ", ".join(each if isinstance(each, str) else json.dumps(each, ensure_ascii=False) for each in value)
    else:
        yield (
            path,
            "none" if value in (None, "", [], (), {}) else value if isinstance(value, str) else json.dumps(value),
        )


def render(run: Run, table: Table, pictures: Sequence[Picture], losses: Sequence[Losses]) -> str:
    """The page. Everything that comes from the run is escaped; only our own pictures, style and script are markup."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"markup": Markup, "json": lambda value: json.dumps(value, ensure_ascii=False)}
    style, script = ((HERE / f"page.{kind}.jinja").read_text(encoding="utf-8") for kind in ("css", "js"))
    return environment.get_template("page.html.jinja").render(
        run=run,
        table=table,
        incomplete=incomplete(table),
        prompts=sum(task.examples for task in run.tasks),
        sections=[shown(table, section, run) for section in table.regimes.values() if section.rows or section.absent],
        results=[each for each in pictures if each.part == "results"],
        matrix=[each for each in pictures if each.part == "experts" and not each.choice],
        confusions=[each for each in pictures if each.choice],
        gates=[each for each in pictures if each.part == "gates"],
        losses=[(router, list(found)) for router, found in groupby(losses, key=lambda each: each.router)],
        settings=settings(run),
        definitions=definitions(table),
        style=style,
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
