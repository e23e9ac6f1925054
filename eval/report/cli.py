"""`moerge eval report`: the files that a reader wants, from the folder of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from eval.report import HTML, NO_PAGE, write_report
from eval.terminal import INCOMPLETE, fail, out, progress_bar, say


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `moerge eval run --out` made.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the paths as JSON.")] = False,
) -> None:
    """Write report.html, report.md, report.csv and report.json into the folder of a run."""
    from eval.records import NotARun, read_run

    try:
        with progress_bar() as tell:
            paths = write_report(folder, tell)
        complete = read_run(folder).complete
    except (NotARun, OSError) as error:
        fail(str(error))
    if as_json:
        typer.echo(json.dumps({"complete": complete, "files": [str(path) for path in paths]}, indent=1))
    else:
        for path in paths:
            out.print(str(path), markup=False, highlight=False, soft_wrap=True)
    if all(path.name != HTML for path in paths):
        say(NO_PAGE)
    if not complete:
        say("The run is incomplete; the report says what is missing.")
        raise typer.Exit(INCOMPLETE)
