"""`moerge expert check`: what a version adds, whom it changes, what gets worse, and the policy's ruling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.padding import Padding
from rich.table import Table

from serving.commands.common import DEFAULT_URL, ApiKey, AsJson, Url, answer, client, err, follow, out, print_json

#: What a reader asks -> the sections that answer it.
QUESTIONS = {
    "What it adds": ("own_task",),
    "Whom it changes": ("confusion",),
    "What gets worse": ("regression",),
    "What it is": ("duplicates", "loudness", "triggers", "declared"),
}
#: Columns that are shares.
SHARES = ("score", "other_answer", "change")
#: Rows of a section that are shown.
SHOWN = 8


def check(
    name: Annotated[str, typer.Argument(help="The expert's name.")],
    version: Annotated[
        int | None, typer.Option(help="The latest staged one, else the active one, when not given.")
    ] = None,
    stored: Annotated[bool, typer.Option(help="Show the last report; ask nothing.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Test a version before it is used; exit code 1 when the policy objects to it."""
    path, params = f"/v1/experts/{name}/check", {} if version is None else {"version": str(version)}
    with client(url, api_key) as http:
        if stored:
            report = answer(http.get(path, params=params))
        else:
            report = follow(
                http, path, "check", quiet=as_json, shown=f"moerge expert check {name} --stored", params=params
            )
    if as_json:
        print_json(report)
    else:
        tell(report)
    if not report["ruling"]["passed"] and report["ruling"]["enforce"] != "never":
        raise typer.Exit(1)


def tell(report: dict[str, Any]) -> None:
    """The report as a maintainer reads it."""
    out.print(
        f"{report['name']} version {report['version']} ({report['state']}), checked at generation "
        f"{report['generation']}, routed by {report['method']}",
        style="bold",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if report["stale"]:
        now = report["current_generation"]
        err.print(
            f"This report was made at generation {report['generation']}, now it is {now}: it may not hold any more.",
            style="yellow",
            highlight=False,
            soft_wrap=True,
        )
    sections = {each["name"]: each for each in report["sections"]}
    required = report["ruling"]["required"]
    for question, names in QUESTIONS.items():
        out.print(f"\n{question}", style="bold")
        for each in names:
            if each in sections:
                tell_section(sections[each], required=each in required)
    out.print()
    for note in report["notes"]:
        out.print(note, style="dim", markup=False, highlight=False, soft_wrap=True)
    tell_ruling(report)


def tell_section(section: dict[str, Any], *, required: bool) -> None:
    mark, style = {True: ("+", "green"), False: ("-", "red"), None: ("?", "yellow")}[section["passed"]]
    figure = "" if section["figure"] is None else f" {section['figure']:.3g} (limit {section['limit']:g})"
    told = "" if required else ", informs only"
    line = f"  {mark} {section['name']}{figure}{told}: {section['detail']}"
    out.print(line, style=style, markup=False, highlight=False, soft_wrap=True)
    if rows := section["rows"]:
        out.print(Padding(table_of(rows), (0, 0, 0, 4)))


def table_of(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for k, column in enumerate(rows[0]):
        table.add_column(column.replace("_", " "), justify="right" if k else "left")
    for row in rows[:SHOWN]:
        table.add_row(*(cell(column, value) for column, value in row.items()))
    if len(rows) > SHOWN:
        table.add_row(f"... and {len(rows) - SHOWN} more")
    return table


def cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0%}" if column in SHARES else f"{value:.3g}"
    return str(value)


def tell_ruling(report: dict[str, Any]) -> None:
    ruling = report["ruling"]
    out.print()
    if ruling["passed"]:
        out.print("It passes what checks.require asks for.", style="bold green", highlight=False)
        if report["state"] == "staged":
            words = f"moerge expert promote {report['name']} {report['version']}"
            out.print(f"To serve it: {words}", markup=False, highlight=False, soft_wrap=True)
        return
    consequence = {
        "never": "Nothing comes of that: checks.enforce is never.",
        "warn": "It can be promoted all the same: checks.enforce is warn.",
        "always": "It is not promoted without --force: checks.enforce is always.",
    }[ruling["enforce"]]
    names = ", ".join(each["code"] for each in ruling["reasons"])
    told = f"It does not pass what checks.require asks for: {names}. {consequence}"
    out.print(told, style="bold red", markup=False, highlight=False, soft_wrap=True)
