"""Tables as text: Markdown, CSV, and cells for whoever draws them otherwise."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence

from eval.intervals import LEVEL, Estimate
from eval.sections import FIGURES, Row, Section
from eval.table import Table

MARKS = {"better": " ▲", "worse": " ▼", "": ""}
SOME = 10  # things that are missing, as many as are named
_PREFIXES = ("", "k", "M", "G", "T", "P")


def estimate(figure: Estimate | None, digits: int = 3, sign: str = "") -> str:
    """`0.412 [0.350, 0.471]`"""
    if figure is None:
        return ""
    value, low, high = (f"{each:{sign}.{digits}f}" for each in (figure.value, figure.low, figure.high))
    return f"{value} [{low}, {high}]"


def short(value: float) -> str:
    """Three digits and a prefix: `2.21 G`."""
    step = 0
    while abs(value) >= 999.5 and step < len(_PREFIXES) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.3g} {_PREFIXES[step]}".strip()


def _difference(row: Row) -> str:
    return estimate(row.difference.estimate, sign="+") + MARKS[row.difference.mark] if row.difference else ""


def _value(name: str, form: str = ".3f") -> Callable[[Row], str]:
    return lambda row: f"{row.figures[name].value:{form}}" if name in row.figures else ""


def _place(place: int | None) -> str:
    return "" if place is None else str(place)


def _missing(row: Row) -> str:
    return f"{row.counts['missing']} of {row.counts['expected']}" if row.counts["missing"] else ""


#: What a table shows of a row, in order: a column's name -> its title and its text.
COLUMNS: dict[str, tuple[str, Callable[[Row], str]]] = {
    "router": ("router", lambda row: row.name),
    "missing": ("missing", _missing),
    "score": ("score", lambda row: estimate(row.figures.get("score"))),
    "normalised": ("normalised", _value("normalised")),
    "difference": ("to the baseline", _difference),
    "borda": ("Borda", lambda row: _place(row.borda_place)),
    "kemeny": ("Kemeny", lambda row: _place(row.kemeny_place)),
    "top1": ("top-1", _value("top1")),
    "top3": ("top-3", _value("top3")),
    "regret": ("regret", _value("regret")),
    "abstained": ("abstained", _value("abstained")),
    "false_accepts": ("false accepts", _value("false_accepts")),
    "p50_ms": ("p50 ms", _value("p50_ms", ".0f")),
    "p95_ms": ("p95 ms", _value("p95_ms", ".0f")),
    "tokens_per_s": ("tokens/s", _value("tokens_per_s", ".1f")),
    "loads": ("loads", _value("loads", ".4g")),
    "flops": ("FLOPs/token", lambda row: short(row.figures["flops"].value) if "flops" in row.figures else ""),
}


def cells(section: Section, columns: Sequence[str] | None = None) -> tuple[list[str], list[list[str]]]:
    """Titles, and for each row its texts, of those columns that say something."""
    wanted = [COLUMNS[name] for name in columns or COLUMNS]
    texts = [[text(row) for row in section.rows] for _, text in wanted]
    kept = [number for number, column in enumerate(texts) if any(column) or not number]
    return [wanted[k][0] for k in kept], [[texts[k][n] for k in kept] for n in range(len(section.rows))]


def notes(table: Table, section: Section) -> Iterator[str]:
    """What has to be known to read the rows."""
    drawn = "of other tasks" if section.drawn == "tasks" else "of other prompts of these tasks"
    yield f"{section.examples} prompts, {len(section.tasks)} tasks; [low, high]: {LEVEL:.0%}, {drawn}."
    if any(row.difference for row in section.rows):
        yield f"Baseline: {table.baseline}; ▲ better, ▼ worse (sign flips, corrected for the number of routers)."
    else:
        yield f"There is nothing to compare with the baseline '{table.baseline}' here."
    if section.ranked:
        kemeny = "" if section.exact else "; Kemeny's order is a good one, not known to be the best"
        yield f"Places by Borda and Kemeny are over {section.ranked} tasks{kemeny}."
    for task, reason in section.left_out.items():
        yield f"{task}: {reason}."
    if section.absent:
        yield f"No records of: {', '.join(section.absent)}."


def incomplete(table: Table) -> str:
    """What is missing, in a line; "" when nothing is."""
    lacking = [row.name for each in table.regimes.values() for row in each.rows if row.counts["missing"]]
    if table.complete and not lacking:
        return ""
    named = list(table.missing) or [f"records of {name}" for name in dict.fromkeys(lacking)]
    more = f"; and {len(named) - SOME} more" if len(named) > SOME else ""
    return f"INCOMPLETE: {'; '.join(named[:SOME]) or 'the run did not end'}{more}"


def markdown(table: Table, columns: Sequence[str] | None = None) -> str:
    """A table to each regime, those of slices after them; `columns` are names of COLUMNS."""
    parts = [f"**{incomplete(table)}**"] if incomplete(table) else []
    for regime, section in table.regimes.items():
        if section.rows:
            titles, rows = cells(section, columns)
            lines = [_line(titles), _line(["---"] * len(titles)), *(_line(row) for row in rows)]
            head = f"### {regime}" + (f" ({table.where})" if table.where else "")
            parts += [head, "\n".join(lines), " ".join(map(_escaped, notes(table, section)))]
    parts += [markdown(each, columns).strip() for each in table.slices.values()]
    return "\n\n".join(part for part in parts if part) + "\n"


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escaped, texts))} |"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def csv_text(table: Table) -> str:
    """A line to each slice, regime and router; every figure with its ends, and the mean of each task."""
    tasks = list(dict.fromkeys(task for each in _all(table) for s in each.regimes.values() for task in s.tasks))
    ends = [name for figure in FIGURES for name in (figure, f"{figure}_low", f"{figure}_high")]
    told = ["difference", "difference_low", "difference_high", "p", "q", "mark", "borda", "borda_place", "kemeny_place"]
    counts = ["expected", "answered", "missing", "errors"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    head = ["where", "regime", "router", "kind", "family", "complete"]
    writer.writerow([*head, *ends, *told, *counts, *(f"task:{task}" for task in tasks)])
    for each in _all(table):
        for regime, section in each.regimes.items():
            for row in section.rows:
                about = [each.where, regime, row.name, row.router.kind, row.router.family, table.complete]
                figures = [value for name in FIGURES for value in _ends(row.figures.get(name))]
                means = [row.tasks.get(task, "") for task in tasks]
                writer.writerow([*about, *figures, *_compared(row), *(row.counts[name] for name in counts), *means])
    return text.getvalue()


def _all(table: Table) -> list[Table]:
    return [table, *table.slices.values()]


def _ends(figure: Estimate | None) -> tuple[float | str, ...]:
    return (figure.value, figure.low, figure.high) if figure else ("", "", "")


def _compared(row: Row) -> list[float | str | None]:
    told = row.difference
    compared = [*_ends(told.estimate), told.p, told.q, told.mark] if told else [""] * 6
    return [*compared, row.borda, row.borda_place, row.kemeny_place]
