"""The documentation names every reason to refuse, state and source error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import adapters_registry
from adapters_registry.errors import SourceError
from adapters_registry.expert import State

PACKAGE = Path(adapters_registry.__file__).parent
DOCS = PACKAGE.parent / "docs" / "registry.md"


@pytest.fixture(scope="module")
def docs() -> str:
    return DOCS.read_text(encoding="utf-8")


def test_every_reason_to_refuse_is_documented_and_no_other(docs: str) -> None:
    code = re.compile(r'(?:(?:Reason|SameContent)\(|\.add\(|\.many\(|\.refuse\([\w.]+, )\s*"([a-z]+_[a-z_]+)"')
    used = {match for file in PACKAGE.glob("*.py") for match in code.findall(file.read_text(encoding="utf-8"))}
    section = docs.partition("## What is refused")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert used == documented


def test_every_state_and_source_error_is_documented(docs: str) -> None:
    for name in [*(f"`{state}`" for state in State), *(f"`{each.__name__}`" for each in SourceError.__subclasses__())]:
        assert name in docs
