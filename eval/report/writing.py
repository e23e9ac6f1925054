"""The files of a report."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from eval.asking import Tell
from eval.columns import columns_of
from eval.extra import ExtraMissing, extra
from eval.records import Record, Run, read_examples, read_records, read_run
from eval.report import CSV, HTML, JSON, MARKDOWN
from eval.report.examples import Losses, Oracle, losses
from eval.report.figures import Tally, gates
from eval.report.gallery import best, confusions, drawn
from eval.report.page import definitions, render, settings
from eval.table import Table, table
from eval.table_text import csv_text, markdown

EVERY = 500  # records between two signs of life


def write(folder: Path, tell: Tell, made: Table | None = None) -> list[Path]:
    run = read_run(folder)
    tally, oracle = Tally(run), Oracle()
    records = _noticed(_counted(read_records(folder), run, "reading", tell), tally, oracle)
    if made is None:
        told = table(run, columns_of(records))
    else:
        told = made
        deque(records, maxlen=0)
    routers = [info.name for info in run.routers if info.kind == "router"]
    examples = {example.id: example for example in read_examples(folder)}
    lost = losses(_counted(read_records(folder), run, "reading again", tell), oracle, routers, examples)

    files = {
        JSON: json.dumps(document(run, told, tally, lost), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
        CSV: csv_text(told),
        MARKDOWN: prose(run, told, tally),
    }
    try:
        extra("matplotlib")
    except ExtraMissing:
        (folder / HTML).unlink(missing_ok=True)
    else:
        files = {HTML: render(run, told, drawn(run, told, tally, tell), lost), **files}
    return [_written(folder / name, text) for name, text in files.items()]


def _noticed(records: Iterable[Record], *those: Tally | Oracle) -> Iterator[Record]:
    for record in records:
        for each in those:
            each.add(record)
        yield record


def _counted(records: Iterable[Record], run: Run, what: str, tell: Tell) -> Iterator[Record]:
    for done, record in enumerate(records):
        if done % EVERY == 0:
            tell(what, done, max(run.expected, done))
        yield record


def _written(path: Path, text: str) -> Path:
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
    return path


def document(run: Run, told: Table, tally: Tally, lost: list[Losses]) -> dict[str, Any]:
    """report.json: the table, and what the pictures show. What says nothing is null."""
    shown = {
        "run": run.model_dump(mode="json", exclude={"traces"}),
        "table": told.json(),
        "expert_matrix": tally.matrix().json(),
        "confusion": {name: tally.confusion(name).json() for name in _routers(told)},
        "abstention": {
            regime: {row.name: curve.json() for row in section.rows if (curve := tally.abstention(regime, row.name))}
            for regime, section in told.regimes.items()
        },
        "gates": [each.json() for each in gates(run)],
        "losses": [each.json() for each in lost],
        "definitions": dict(definitions(told)),
    }
    return {key: _finite(value) for key, value in shown.items()}


def _routers(told: Table) -> list[str]:
    inside = told.regimes.get("in-distribution")
    return [row.name for row in inside.rows if row.router.kind == "router"] if inside else []


def _finite(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not abs(value) < float("inf") else value


def prose(run: Run, told: Table, tally: Tally) -> str:
    """report.md: the tables, what was confused most, and what was run. HTML in names is shown, not meant."""
    parts = [
        f"# {run.suite}",
        f"{len(run.experts)} experts{' of ' + run.base if run.base else ''}, {len(run.tasks)} tasks, "
        f"{sum(task.examples for task in run.tasks)} prompts. Suite {run.digest[:16]}.",
        f"Complete: all {run.expected} records are there." if run.complete else "",
        markdown(told).strip(),
    ]
    inside = told.regimes.get("in-distribution")
    if inside:
        lines = [f"- {row.name}: {confusions(tally.confusion(row.name))}" for row in best(inside)]
        parts += ["## Who answered instead", "\n".join(lines)]
    parts += ["## What was run", "\n".join(f"- {name}: {value}" for name, value in settings(run))]
    parts += ["## Figures", "\n".join(f"- {name}: {text}" for name, text in definitions(told))]
    text = "\n\n".join(part for part in parts if part) + "\n"
    return text.replace("&", "&amp;").replace("<", "&lt;")
