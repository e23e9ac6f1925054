"""What came of a run, for readers: report.json, report.csv, report.md, and a page with pictures, report.html."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from eval.asking import Tell

if TYPE_CHECKING:
    from eval.table import Table

#: The page comes first, where there is one.
HTML, MARKDOWN, CSV, JSON = "report.html", "report.md", "report.csv", "report.json"
NO_PAGE = f"There is no {HTML}: its pictures need matplotlib. pip install 'moerge[eval]'"


def write_report(folder: Path, tell: Tell = lambda what, done, total: None, made: Table | None = None) -> list[Path]:
    """Made of what `moerge eval run` left in the folder; equal runs have equal bytes. Returns what was written.

    `made` is the run's table, where there is one already.

    Raises NotARun. Without matplotlib there is no page; an old one is removed, as it would tell of another run.
    """
    from eval.report.writing import write

    return write(folder, tell, made)
