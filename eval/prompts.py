"""Prompts in JSONL files, one row to a prompt: `{"task": ..., <field>: ...}`. Every bad row is named.

A field is the name of a column, or two with a plus between them, `definition+input`: an instruction and what it is
applied to, read together as the server reads a system message and a user's turn.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from router.text import BUDGET, combine, shorten

Prompt = tuple[str, str]  # task, text

TOLD = 20  # problems that an error lists; it counts the others


class BadPrompts(Exception):
    """What is wrong with the files, all of it."""

    def __init__(self, problems: Sequence[str]) -> None:
        more = [f"... and {len(problems) - TOLD} more"] if len(problems) > TOLD else []
        super().__init__("\n".join([*problems[:TOLD], *more]))
        self.problems = tuple(problems)


@dataclass(frozen=True)
class Files:
    """Which files to read, and which fields of their rows.

    register     rows that the experts are registered with; several files are read as one
    test         rows to route; a file that also registers says in a column `split` which rows are which
    ood          rows that belong to no expert; their task is not needed
    tasks        a row to a task, with its `cluster`: tasks that cannot be told apart
    fields       of the test's rows
    register_fields, ood_fields  of the others', if they are other fields
    description  the field of registering rows that describes the expert
    samples      rows of a task that are registered, of each file: the first
    """

    register: tuple[Path, ...]
    test: tuple[Path, ...]
    ood: tuple[Path, ...] = ()
    tasks: tuple[Path, ...] = ()
    fields: tuple[str, ...] = ("instance",)
    register_fields: tuple[str, ...] = ()
    ood_fields: tuple[str, ...] = ()
    description: str | None = None
    samples: int = 20


@dataclass(frozen=True)
class Prompts:
    """Prompts to register and to test with, each with its task, and prompts that belong to none.

    samples       the texts that each task is registered with, () for one that has nothing but a description
    descriptions  of the tasks that have one
    test          prompts of registered tasks
    ood           prompts of no registered task, with the task or source that they come from, "" if not known
    clusters      of the tasks that have one
    left_out      how many test prompts there are of each task that is not registered; none of them is in `test`
    repeated      test prompts whose text is also a sample of their own task
    """

    samples: Mapping[str, tuple[str, ...]]
    test: tuple[Prompt, ...]
    ood: tuple[Prompt, ...] = ()
    descriptions: Mapping[str, str] = field(default_factory=dict)
    clusters: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    repeated: int = 0

    def texts(self) -> list[str]:
        """Every text there is, once each."""
        sampled = (text for texts in self.samples.values() for text in texts)
        return list(dict.fromkeys([*sampled, *(text for _, text in (*self.test, *self.ood))]))


@dataclass(frozen=True)
class Row:
    """One line of a file."""

    file: Path
    line: int
    values: dict[str, Any]

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def task(self) -> str:
        return str(self.values.get("task", ""))


def read_prompts(files: Files) -> Prompts:
    """Raises BadPrompts, naming everything that is wrong in any of the files."""
    problems: list[str] = []
    samples, descriptions = _registered(files, problems)
    test = _rows(files.test, problems, split=("test",), other=files.register)
    tested = [(row.task, text) for row, texts in _texts(test, files.fields, problems) for text in texts]
    ood = _out_of_domain(files, samples, problems)
    clusters = _clusters(files.tasks, problems)
    known = [(task, text) for task, text in tested if task in samples]
    if not problems and not known:
        problems.append(f"{_named(files.test)}: no row is of a registered task; those are {_some(samples)}")
    if problems:
        raise BadPrompts(problems)
    return Prompts(
        samples=samples,
        descriptions=descriptions,
        test=tuple(known),
        ood=tuple(ood),
        clusters=clusters,
        left_out=dict(Counter(task for task, _ in tested if task not in samples)),
        repeated=sum(text in samples[task] for task, text in known),
    )


def read_samples(files: Files) -> dict[str, tuple[str, ...]]:
    """What the registering rows alone give each task. Raises BadPrompts."""
    problems: list[str] = []
    samples, _ = _registered(files, problems)
    if problems:
        raise BadPrompts(problems)
    return samples


def _registered(files: Files, problems: list[str]) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """The samples and the descriptions of every task, tasks in the order of their names."""
    rows = _rows(files.register, problems, split=("register", "train"), other=files.test)
    tasks = sorted({row.task for row in rows})
    if len(tasks) < 2 and not problems:
        problems.append(f"{_named(files.register)}: routing needs two tasks at least; there is {', '.join(tasks)}")
    about = files.description
    described = [row for row in rows if about and _holds(row, about)]
    if rows and about and not described:
        problems.append(f"{_named(files.register)}: no row has a field '{about}'; {_columns(rows)}")
    descriptions = {row.task: str(row.values[about]).strip() for row in reversed(described) if about}

    fields = files.register_fields or files.fields
    only_described = {row.place for row in described if not any(_holds(row, each) for each in fields)}
    samples: dict[str, list[str]] = {task: [] for task in tasks}
    taken: Counter[tuple[Path, str]] = Counter()
    for row, texts in _texts([row for row in rows if row.place not in only_described], fields, problems):
        taken[row.file, row.task] += 1
        if taken[row.file, row.task] <= files.samples:
            samples[row.task] += texts
    return {task: tuple(texts) for task, texts in samples.items()}, {k: v for k, v in descriptions.items() if v}


def _out_of_domain(files: Files, registered: Container[str], problems: list[str]) -> list[Prompt]:
    rows = _rows(files.ood, problems, tasks=False)
    problems += [
        f"{row.place}: task '{row.task}' is registered, so its prompts are not out of domain"
        for row in rows
        if row.task in registered
    ]
    found = _texts(rows, files.ood_fields or files.fields, problems)
    return [(row.task or str(row.values.get("source", "")), text) for row, texts in found for text in texts]


def _clusters(paths: Sequence[Path], problems: list[str]) -> dict[str, str]:
    rows = _rows(paths, problems)
    if rows and not any(_holds(row, "cluster") for row in rows):
        problems.append(f"{_named(paths)}: no row has a field 'cluster'; {_columns(rows)}")
    return {row.task: str(row.values["cluster"]) for row in rows if row.values.get("cluster")}


def _texts(rows: Sequence[Row], fields: Sequence[str], problems: list[str]) -> Iterator[tuple[Row, list[str]]]:
    """The routing texts of each row: one to each of the fields that it has."""
    absent = [each for each in fields if rows and not any(_holds(row, each) for row in rows)]
    problems += [f"{_named({row.file: 0 for row in rows})}: no row has a field '{f}'; {_columns(rows)}" for f in absent]
    for row in rows:
        mine = [each for each in fields if _holds(row, each)]
        if not mine and not absent:
            problems.append(f"{row.place}: no field '{' or '.join(fields)}'; {_columns([row])}")
        yield row, [text for each in mine if (text := _text(row, each, problems)) is not None]


def _text(row: Row, name: str, problems: list[str]) -> str | None:
    parts = [row.values[part] for part in _parts(row, name)]
    for part in parts:
        if not isinstance(part, str) or not part.strip():
            problems.append(f"{row.place}: '{name}' is {json.dumps(part)[:60]}; it must be a text, and not empty")
            return None
        if "\0" in part or part.encode(errors="replace").decode() != part:
            problems.append(f"{row.place}: '{name}' has a NUL or half of a surrogate pair, which are no characters")
            return None
    stripped = [part.strip() for part in parts]
    return shorten(stripped[0], BUDGET) if len(stripped) == 1 else combine(stripped[0], stripped[1], BUDGET)


def _parts(row: Row, name: str) -> tuple[str, ...]:
    """The columns that a field reads: its own, or an instruction's and an input's."""
    if name in row.values or name.count("+") != 1:
        return (name,)
    instruction, _, prompt = name.partition("+")
    return instruction, prompt


def _holds(row: Row, name: str) -> bool:
    return all(part in row.values for part in _parts(row, name))


def _rows(
    paths: Sequence[Path],
    problems: list[str],
    *,
    tasks: bool = True,
    split: tuple[str, ...] = (),
    other: Sequence[Path] = (),
) -> list[Row]:
    """The rows of these files; of a file that is among the `other` ones, too, those whose `split` is one of these."""
    rows: list[Row] = []
    seen: dict[str, str] = {}
    for path in paths:
        mine = [row for row in _lines(path, problems) if _good(row, tasks, seen, problems)]
        if mine and path in other:
            there = sorted({str(row.values.get("split")) for row in mine})
            mine = [row for row in mine if row.values.get("split") in split]
            if not mine:
                wanted = " or ".join(split)
                problems.append(
                    f"{path} registers and tests, and no row's 'split' is {wanted}; there are: {_some(there)}"
                )
        rows += mine
    return rows


def _lines(path: Path, problems: list[str]) -> Iterator[Row]:
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        problems.append(f"{path}: {error.strerror or error}")
        return
    if not any(line.strip() for line in lines):
        problems.append(f"{path}: holds no rows")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line.decode())
        except UnicodeDecodeError as error:
            problems.append(f"{path}:{number}: not UTF-8 ({error.reason})")
        except (ValueError, RecursionError) as error:
            problems.append(f"{path}:{number}: not JSON ({error})")
        else:
            if isinstance(values, dict):
                yield Row(path, number, values)
            else:
                problems.append(f'{path}:{number}: not an object such as {{"task": ..., "instance": ...}}')


def _good(row: Row, tasks: bool, seen: dict[str, str], problems: list[str]) -> bool:
    """Whether it says its task; an id that a row before it had is a problem, too."""
    task, key = row.values.get("task"), row.values.get("id")
    if key is not None and (first := seen.setdefault(str(key), row.place)) != row.place:
        problems.append(f"{row.place}: the id '{key}' is also that of {first}")
    if tasks and not (isinstance(task, str) and task.strip()):
        said = f"'task' is {json.dumps(task)[:60]}" if "task" in row.values else "no field 'task'"
        problems.append(f"{row.place}: {said}; it names the expert that the prompt belongs to")
        return False
    return True


def _columns(rows: Iterable[Row]) -> str:
    return f"there are: {_some(dict.fromkeys(name for row in rows for name in row.values))}"


def _named(paths: Iterable[Path]) -> str:
    return ", ".join(map(str, paths))


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:TOLD]) + (f" and {len(shown) - TOLD} more" if len(shown) > TOLD else "")
