"""Shared by the tests of reports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.eval.report.runs import Made

#: What models and people may write.
SCRIPT = '<script>document.title="owned"</script><img src=x onerror="document.title=\'owned\'">'
NAMES = (SCRIPT, "$x_$ </svg> an uncommonly long name of a router: retrieval, k=12, temperature=0.25, scoring=best")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """make("a", experts=..., routers=..., lost=...): the folder of a run."""
    return lambda name="run", **options: Made(**options).write(tmp_path / name)


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of an incomplete run whose names, tags and answers are markup: it is read, never changed."""
    pytest.importorskip("matplotlib", reason="the extra `eval` is not installed")
    from eval.report import write_report

    made = Made(experts=4, routers=4, per_task=3, names=NAMES, answer=SCRIPT, tag=SCRIPT, lost=20)
    folder = made.write(tmp_path_factory.mktemp("odd"))
    write_report(folder)
    return folder
