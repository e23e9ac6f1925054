"""A YAML file whose problems are told with the lines they are on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

Where = tuple[int | str, ...]


class Unreadable(ValueError):
    """No file, no text or no YAML: there is nothing to look at."""


class YamlFile:
    """Content, and the problems that its readers find, each as `file:line: field: what`.

    Fields are named by the way to them, `("experts", 3, "name")`.
    """

    def __init__(self, path: Path) -> None:
        """Raises Unreadable, with the line where there is one."""
        self.path = path
        self.problems: list[str] = []
        try:
            text = path.read_text(encoding="utf-8")
            self._root = yaml.compose(text, Loader=yaml.SafeLoader)
            self.content: Any = yaml.safe_load(text)
        except OSError as error:
            raise Unreadable(f"{path}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise Unreadable(f"{path}: is not UTF-8: {error}") from error
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            raise Unreadable(f"{path}{line}: not YAML: {getattr(error, 'problem', error)}") from error
        if self._root is not None:
            self._refuse_repeated_keys(self._root, ())

    @property
    def folder(self) -> Path:
        """What paths in the file are relative to."""
        return self.path.absolute().parent

    def problem(self, where: Where, message: str, otherwise: str = "file") -> None:
        """`otherwise` names the file as a whole, for a problem of no field of it."""
        field = ".".join(str(part) for part in where)
        self.problems.append(f"{self.place(where)}: {field or otherwise}: {message}")

    def place(self, where: Where) -> str:
        """`file:line` of a field, or of the nearest thing around it that is in the file."""
        return f"{self.path}:{self._line(where)}"

    def _line(self, where: Where) -> int:
        node, line = self._root, 1
        for part in where:
            if isinstance(node, yaml.MappingNode):
                pairs = [(key, value) for key, value in node.value if key.value == str(part)]
                if not pairs:
                    break
                line, node = pairs[0][0].start_mark.line + 1, pairs[0][1]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                node = node.value[part]
                line = node.start_mark.line + 1
            else:
                break
        return line

    def _refuse_repeated_keys(self, node: yaml.Node, where: Where) -> None:
        """YAML keeps the last of two equal keys and drops the other without a word."""
        if isinstance(node, yaml.SequenceNode):
            for index, child in enumerate(node.value):
                self._refuse_repeated_keys(child, (*where, index))
        elif isinstance(node, yaml.MappingNode):
            seen: set[Any] = set()
            for key, child in node.value:
                if key.value in seen:
                    field = ".".join(str(part) for part in (*where, key.value))
                    self.problems.append(f"{self.path}:{key.start_mark.line + 1}: {field}: given twice")
                seen.add(key.value)
                self._refuse_repeated_keys(child, (*where, key.value))
