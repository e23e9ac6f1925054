"""Jinja2 over the columns of a row, in its sandbox: templates give text, expressions give any value.

A column that is not there is an error, and so is one that has no value where text is made of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from jinja2 import StrictUndefined, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment


class BadTemplate(ValueError):
    """What is wrong with a template, or with what a row gives it."""


def _text(value: Any) -> Any:
    if value is None:
        raise BadTemplate("a column that it shows has no value (null)")
    return value


def regex_replace(text: str, pattern: str, value: str = "", count: int = 0) -> str:
    """As in lm-evaluation-harness, so that its templates work."""
    return re.sub(pattern, value, text, count=count)


_environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, finalize=_text, autoescape=False)
_environment.filters["regex_replace"] = regex_replace


def names(template: str) -> set[str]:
    """The names that a template reads. Raises BadTemplate."""
    try:
        return set(meta.find_undeclared_variables(_environment.parse(template)))
    except TemplateError as error:
        raise BadTemplate(str(error)) from error


def check(template: str, *, expression: bool = False) -> None:
    """Raises BadTemplate for one that cannot be read."""
    (_expression if expression else _template)(template)


def render(template: str, row: Mapping[str, Any]) -> str:
    """Raises BadTemplate."""
    if "{" not in template:
        return template
    return str(_run(lambda: _template(template).render(row), row))


def evaluate(expression: str, row: Mapping[str, Any]) -> Any:
    """Raises BadTemplate."""
    value = _run(lambda: _expression(expression)(row), row)
    if isinstance(value, StrictUndefined):
        raise BadTemplate(f"{value._undefined_message}{_beside(row)}")
    return value


def _run(work: Callable[[], Any], row: Mapping[str, Any]) -> Any:
    try:
        return work()
    except TemplateError as error:
        raise BadTemplate(f"{error}{_beside(row) if 'undefined' in str(error) else ''}") from error
    except BadTemplate:
        raise
    except Exception as error:  # whatever a method of a column's value raises
        raise BadTemplate(f"{type(error).__name__}: {error}") from error


def _beside(row: Mapping[str, Any]) -> str:
    columns = row.get("row", row)
    return f"; the row has {', '.join(map(str, columns)) or 'no columns'}"


@lru_cache(maxsize=1024)
def _template(template: str) -> Any:
    try:
        return _environment.from_string(template)
    except TemplateError as error:
        raise BadTemplate(str(error)) from error


@lru_cache(maxsize=1024)
def _expression(expression: str) -> Callable[..., Any]:
    try:
        return _environment.compile_expression(expression, undefined_to_none=False)
    except TemplateError as error:
        raise BadTemplate(f"{error}; an expression is written without {{{{ }}}}") from error
