"""Errors say what, which value, and what would work."""

from __future__ import annotations

import inspect

import pytest

from adapters_registry import errors
from adapters_registry.errors import ExpertNotFound, ExpertRefused, Reason, RegistryError, VersionNotFound


def test_every_error_is_a_registry_error_and_drawn_in_the_tree() -> None:
    assert errors.__doc__ is not None
    for name, each in inspect.getmembers(errors, inspect.isclass):
        if issubclass(each, Exception):
            assert issubclass(each, RegistryError)
            assert name in errors.__doc__


def test_an_unknown_expert_lists_the_known_ones() -> None:
    assert str(ExpertNotFound("poetry", known=["maths", "code"])) == "No expert 'poetry'. Registered: code, maths."
    assert str(ExpertNotFound("poetry")) == "No expert 'poetry'. Registered: none."
    assert "and 5 more" in str(ExpertNotFound("x", known=[f"e{number:02}" for number in range(25)]))


@pytest.mark.parametrize(("version", "says"), [(None, "no active version"), (7, "no version 7")])
def test_an_unknown_version_lists_the_known_ones(version: int | None, says: str) -> None:
    assert str(VersionNotFound("a", version, ["1 (retired)"])) == f"Expert 'a' has {says}. Versions: 1 (retired)."


def test_a_refusal_gives_every_reason_a_line() -> None:
    refused = ExpertRefused("a", [Reason("x", "First."), Reason("y", "Second.")])
    assert str(refused) == "Expert 'a' was refused:\n- First.\n- Second."
    assert refused.codes == {"x", "y"}
