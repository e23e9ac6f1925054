"""One entry of a suite's file for several: `each: [a, b]`, and `{{ each }}` where they differ."""

from __future__ import annotations

from typing import Any

from adapters_registry.lines import Where, YamlFile
from eval import templates


def expansions(file: YamlFile, given: Any, where: Where) -> list[str | None]:
    """The values of `{{ each }}`; None alone for an entry that stands for itself."""
    if given is None:
        return [None]
    if not isinstance(given, list) or not given or not all(isinstance(each, str | int) for each in given):
        file.problem((*where, "each"), "is a list of words, one for each")
        return []
    return [str(each) for each in given]


def filled(value: Any, each: str | None) -> Any:
    """Every text in it with `{{ each }}` filled in. Raises BadTemplate."""
    if isinstance(value, dict):
        return {key: filled(inner, each) for key, inner in value.items()}
    if isinstance(value, list):
        return [filled(inner, each) for inner in value]
    if isinstance(value, str):
        return templates.render(value, {} if each is None else {"each": each})
    return value
