"""`moerge eval report`: the files that a reader wants, from the folder of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from eval.report import HTML, NO_PAGE, write_report

_out, _err = Console(), Console(stderr=True)

BAD_INPUT, INCOMPLETE = 2, 3  # exit codes


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `moerge eval run --out` made.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the paths as JSON.")] = False,
) -> None:
    """Write report.html, report.md, report.csv and report.json into the folder of a run."""
    from eval.cli import progress_bar
    from eval.records import NotARun, read_run

    try:
        with progress_bar() as tell:
            paths = write_report(folder, tell)
        complete = read_run(folder).complete
    except (NotARun, OSError) as error:
        _say(str(error), "red")
        raise typer.Exit(BAD_INPUT) from None
    if as_json:
        typer.echo(json.dumps({"complete": complete, "files": [str(path) for path in paths]}, indent=1))
    else:
        for path in paths:
            _out.print(str(path), markup=False, highlight=False, soft_wrap=True)
    if all(path.name != HTML for path in paths):
        _say(NO_PAGE, "yellow")
    if not complete:
        _say("The run is incomplete; the report says what is missing.", "yellow")
        raise typer.Exit(INCOMPLETE)


def _say(text: str, style: str) -> None:
    _err.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
