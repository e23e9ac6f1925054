"""What the commands of `moerge eval` share: where they print, how they end, progress, routers named by an option."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from eval.asking import Tell

FAILED, BAD_INPUT, INCOMPLETE, INTERRUPTED = 1, 2, 3, 130  # exit codes


out, err = Console(), Console(stderr=True)


def say(message: str, style: str = "yellow") -> None:
    """On stderr, as it is."""
    err.print(message, style=style or None, markup=False, highlight=False, soft_wrap=True)


def fail(message: str, code: int = BAD_INPUT) -> NoReturn:
    """Ends the command."""
    say(message, "red")
    raise typer.Exit(code)


@contextmanager
def progress_bar(before: str = "") -> Iterator[Tell]:
    """A bar on stderr to each step while this is entered, with the time left of the step that is under way; `before`
    stands before what is done.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TimeRemainingColumn(), console=err, transient=True) as progress:
        known: dict[str, TaskID] = {}

        def tell(what: str, done: int, total: int) -> None:
            if not what:
                return
            if what not in known:
                for earlier in known.values():
                    progress.remove_task(earlier)
                known.clear()
                known[what] = progress.add_task(escape(f"{before} {what}".strip()), total=None)
            progress.update(known[what], completed=done, total=total or None)

        yield tell


def settings_of(given: str) -> dict[str, Any]:
    """Of a method that an option names: NAME, NAME:setting=value,... or NAME:{JSON}. Ends the command for others."""
    from pydantic import ValidationError

    from router.methods import METHODS

    name, _, told = given.partition(":")
    try:
        settings = json.loads(told) if told.startswith("{") else dict(map(_setting, filter(None, told.split(","))))
        METHODS[name].Settings.model_validate(settings)
    except ValidationError as error:
        fail("\n".join(f"--router {given}: {'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()))
    except ValueError as error:
        fail(f"--router {given}: {error}; give settings as {name}:setting=value,... or {name}:{{...}} in JSON.")
    return dict(settings)


def _setting(text: str) -> tuple[str, Any]:
    """`k=5`; values are JSON, or else text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"'{text}' has no '='")
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        return name.strip(), value.strip()
