"""Writes what the documentation takes from the code, between `<!-- begin NAME -->` and `<!-- end NAME -->`.

    python docs/generate.py

A test fails when a page and the code say different things.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

DOCS = Path(__file__).parent


def settings_tables() -> str:
    """Every setting: its name in the file, its variable, its default, what it is."""
    from serving.config import Settings

    parts = []
    for section, model in sections(Settings):
        title = f"### `{section}`" if section else "### At the top"
        about = (model.__doc__ or "").partition("\n\n")[0].strip() if section and model.__doc__ else ""
        intro = about if about.endswith(".") else ""  # some docstrings are tables of the fields
        rows = ["| Setting | Variable | Default | |", "|---|---|---|---|"]
        for name, field in model.model_fields.items():
            if nested(field) is None:
                path = f"{section}.{name}" if section else name
                variable = "MOERGE_" + path.upper().replace(".", "__")
                rows.append(f"| `{path}` | `{variable}` | {default(field)} | {meaning(model, name)} |")
        parts.append("\n".join([title, *(["", intro] if intro else []), "", *rows]))
    return "\n\n".join(parts)


def sections(model: type[BaseModel], name: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """(name in the file, model) of the settings themselves and of every section in them."""
    yield name, model
    for key, field in model.model_fields.items():
        if (inner := nested(field)) is not None:
            yield from sections(inner, f"{name}.{key}" if name else key)


def nested(field: FieldInfo) -> type[BaseModel] | None:
    """The section that a field holds, if it holds one."""
    kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def default(field: FieldInfo) -> str:
    if field.default_factory is not None:
        made = field.default_factory()  # type: ignore[call-arg]
        return "the user's data folder" if isinstance(made, Path) else f"`{json.dumps(made)}`"
    if field.default is PydanticUndefined:
        return "*needed*"
    if field.default in (None, ()):
        return ""
    return f"`{field.default if isinstance(field.default, str) else json.dumps(field.default)}`"


def meaning(model: type[BaseModel], name: str) -> str:
    """The field's description, or its line in the docstring of the class that has it."""
    if described := model.model_fields[name].description:
        return described
    for each in model.__mro__:
        if match := re.search(rf"^ *{name} {{2,}}(.+)$", each.__doc__ or "", re.MULTILINE):
            text = match[1].strip()
            return f"{text[0].upper()}{text[1:]}."
    return ""


def commands() -> str:
    """Every command with its arguments and options, as `--help` tells them."""
    from typer.main import get_command

    from serving.cli import app

    return "\n\n".join(describe(command, path) for path, command in walk(get_command(app), "moerge"))


def walk(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from walk(inner, f"{path} {name}")


def describe(command: Any, path: str) -> str:
    params = [each for each in command.params if each.name not in ("help", *COMPLETION) and not hidden(each)]
    arguments = [each for each in params if each.param_type_name == "argument"]
    words = [path, *(name(each) if each.required else f"[{name(each)}]" for each in arguments)]
    if options := [each for each in params if each.param_type_name == "option"]:
        words.append("[OPTIONS]")
    if inner := getattr(command, "commands", {}):
        words.append("COMMAND")
    parts = [f"## `{path}`", re.sub(r"\s*\n\s*", " ", (command.help or "").strip()), f"```\n{' '.join(words)}\n```"]
    if inner:
        parts.append("\n".join(f"- `{path} {key}`: {short(each)}" for key, each in inner.items()))
    if arguments or options:
        rows = ["| | |", "|---|---|", *(row(each) for each in (*arguments, *options))]
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


COMPLETION = ("install_completion", "show_completion")


def hidden(param: Any) -> bool:
    return bool(getattr(param, "hidden", False))


def name(param: Any) -> str:
    return str(param.metavar or param.name.upper())


def short(command: Any) -> str:
    return (command.help or "").strip().partition("\n")[0]


def row(param: Any) -> str:
    if param.param_type_name == "argument":
        return f"| `{name(param)}` | {param.help or ''} |"
    notes = []
    if param.envvar:
        notes.append(f"or `{param.envvar}`")
    if param.default not in (None, False, (), []) and not callable(param.default):
        notes.append(f"default `{Path(param.default).name if isinstance(param.default, Path) else param.default}`")
    told = f" ({', '.join(notes)})" if notes else ""
    names = ", ".join(f"`{each}`" for each in sorted((*param.opts, *param.secondary_opts), key=len, reverse=True))
    return f"| {names} | {param.help or ''}{told} |"


#: page -> what is generated in it
GENERATED: dict[str, dict[str, Callable[[], str]]] = {
    "configuration.md": {"settings": settings_tables},
    "cli.md": {"commands": commands},
}


def regenerate(page: str) -> str:
    """The page as it should be."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for part, write in GENERATED[page].items():
        begin, end = f"<!-- begin {part} -->", f"<!-- end {part} -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n\n{write()}\n\n{end}{after}"
    return text


if __name__ == "__main__":
    for page in GENERATED:
        (DOCS / page).write_text(regenerate(page), encoding="utf-8")
