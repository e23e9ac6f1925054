"""Shared by the tests of reports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.eval.report.runs import Made


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """make("a", experts=..., routers=..., lost=...): the folder of a run."""
    return lambda name="run", **options: Made(**options).write(tmp_path / name)
