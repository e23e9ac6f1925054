"""What came of a run, for readers: report.json, report.csv, report.md, and a page with pictures, report.html."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Tell = Callable[[str, int, int], None]

#: The page comes first, where there is one.
HTML, MARKDOWN, CSV, JSON = "report.html", "report.md", "report.csv", "report.json"
NO_PAGE = f"There is no {HTML}: its pictures need matplotlib. pip install 'moerge[eval]'"


def write_report(folder: Path, tell: Tell = lambda what, done, total: None) -> list[Path]:
    """Made of what `moerge eval run` left in the folder; equal runs have equal bytes. Returns what was written.

    Raises NotARun. Without matplotlib there is no page; an old one is removed, as it would tell of another run.
    """
    from eval.report.writing import write

    return write(folder, tell)
