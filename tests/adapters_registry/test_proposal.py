"""What a proposal may say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from adapters_registry.proposal import FolderSource, HubSource, Proposal


@pytest.mark.parametrize(
    "fields",
    [
        {"description": "a\0b"},
        {"licence": "\0"},
        {"tags": ("\0",)},
        {"tags": ("x",) * 101},
        {"description": "x" * 10_001},
        {"samples": ({"prompt": ""},)},
        {"samples": ({"prompt": "x\0"},)},
        {"visibility": "secret"},
        {"surprise": 1},
        {"description": "\ud800"},
    ],
)
def test_what_cannot_be_stored_is_refused_early(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Proposal(name="a", source=FolderSource(path=Path("x")), **fields)


def test_sources_are_told_apart_by_their_kind() -> None:
    parsed = Proposal.model_validate({"name": "a", "source": {"kind": "hub", "repo": "org/repo"}})
    assert parsed.source == HubSource(repo="org/repo")
