"""From a suite's data to examples: templates filled in, every row that cannot be used named with its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from eval.asking import Prompt, Tell
from eval.examples import Example
from eval.records import TaskInfo
from eval.rows import NoData, Row, Unreachable, rows_of
from eval.suite import Suite, Task
from eval.templates import BadTemplate, evaluate, render

SHOWN = 20  # bad rows of a task that are named before it is given up


class BadData(Exception):
    """`problems` are `file:line: task.field: what is wrong`, or `data set, row 12: ...`, one for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))


class _BadRow(Exception):
    def __init__(self, field: str, message: str) -> None:
        self.field = field
        super().__init__(message)


def examples_of(
    suite: Suite,
    *,
    limit: int | None = None,
    tasks: Sequence[str] | None = None,
    local: Mapping[str, Path] | None = None,
    tell: Tell = lambda what, done, total: None,
) -> tuple[tuple[Example, ...], tuple[TaskInfo, ...]]:
    """All that is to be asked, task by task.

    limit  examples of each task at most, where neither the task nor the suite has a smaller one
    tasks  only these, by name
    local  files and folders for data that is given, and in place of data sets of the Hub, by their names

    Raises BadData with the problems of all tasks.
    """
    chosen = suite.tasks if tasks is None else _named(suite, tasks)
    readers = []
    seen: dict[str, str] = {}
    missing: set[str] = set()
    reachable = True
    for done, task in enumerate(chosen):
        tell(f"reading {task.name}", done, len(chosen))
        most = min((each for each in (limit, suite.limit, task.limit) if each is not None), default=None)
        reader = _Reader(task, suite.names, seen, most, local)
        readers.append(reader)
        try:
            if not reachable and task.data.hub is not None and task.data.hub not in (local or {}):
                raise NoData(f"{task.data.hub} was not looked for after that")
            reader.read()
        except NoData as error:
            reachable = reachable and not isinstance(error, Unreachable)
            if str(error) not in missing:  # tasks may share what is not there
                missing.add(str(error))
                reader.problems.append(f"{task.place}: {task.name}.data: {error}")
    if problems := [problem for reader in readers for problem in reader.problems]:
        raise BadData(problems)
    return tuple(each for reader in readers for each in reader.examples), tuple(reader.info() for reader in readers)


def _named(suite: Suite, wanted: Sequence[str]) -> list[Task]:
    names = [task.name for task in suite.tasks]
    if unknown := [name for name in wanted if name not in names]:
        raise BadData([f"{suite.path}: there is no task '{name}'; there are: {', '.join(names)}" for name in unknown])
    return [task for task in suite.tasks if task.name in wanted]


class _Reader:
    """One task. `seen` are the ids of the suite so far, and the rows that have them."""

    def __init__(
        self,
        task: Task,
        experts: Sequence[str],
        seen: dict[str, str],
        limit: int | None,
        local: Mapping[str, Path] | None,
    ) -> None:
        self.examples: list[Example] = []
        self.problems: list[str] = []
        self.left_out: list[str] = []
        self._task = task
        self._experts = experts
        self._seen = seen
        self._limit = limit
        self._local = local

    def read(self) -> None:
        """Raises NoData."""
        task = self._task
        read = 0
        for row in rows_of(task.data, shuffle=task.shuffle, local=self._local):
            read += 1
            try:
                self._take(row)
            except _BadRow as error:
                self._bad(f"{row.place}: {'.'.join(filter(None, (task.name, error.field)))}: {error}")
            if len(self.examples) == self._limit or len(self.problems) == SHOWN:
                break
        if not self.examples and not self.problems:
            why = f"none of its {read} rows can be used" if read else "it has no rows"
            if read and task.where and not self.left_out:
                why = f"`where: {task.where}` holds for none of its {read} rows"
            self.problems += [f"{task.place}: {task.name}.data: {task.data}: {why}", *self.left_out[:SHOWN]]
        if len(self.problems) == SHOWN:
            self.problems.append(f"{task.place}: {task.name}: {SHOWN} bad rows; it was not read further")

    def info(self) -> TaskInfo:
        owners = dict.fromkeys(owner for example in self.examples for owner in example.owners)
        tags = dict.fromkeys(tag for example in self.examples for tag in example.tags)
        return TaskInfo(
            name=self._task.name,
            metric=self._task.metric,
            owners=self._task.owners or tuple(owners),
            tags=tuple(tags),
            examples=len(self.examples),
            left_out=tuple(self.left_out),
        )

    def _bad(self, problem: str) -> None:
        (self.left_out if self._task.on_bad_row == "skip" else self.problems).append(problem)

    def _take(self, row: Row) -> None:
        if row.columns is None:
            raise _BadRow("", row.problem)
        task = self._task
        columns = {"row": row.columns, **row.columns} | ({} if task.each is None else {"each": task.each})
        if task.where is not None and not _filled("where", evaluate, task.where, columns):
            return
        example = example_of(task, row, columns)
        for owner in example.owners:
            if owner not in self._experts:
                raise _BadRow("experts", f"there is no expert '{owner}'; there are: {', '.join(self._experts)}")
        if (before := self._seen.setdefault(example.id, row.place)) is not row.place:
            raise _BadRow("id", f"'{example.id}' is also the id of {before}")
        self.examples.append(example)


def example_of(task: Task, row: Row, columns: Mapping[str, Any]) -> Example:
    """Raises _BadRow."""
    from eval.scoring import METRICS

    prompt = _filled("prompt", render, task.prompt, columns)
    if not prompt.strip():
        raise _BadRow("prompt", "is empty")
    delimiter = task.delimiter if task.delimiter is not None else " " if task.form == "completion" else ""
    answers = _texts("answers", task.answers, columns)
    if METRICS[task.metric].needs == "likelihood":
        answers = _joined(answers, delimiter)
    if not all(answer.strip() for answer in answers):
        raise _BadRow("answers", "is empty")
    owners = _texts("experts", task.experts, columns)
    choices = _texts("choices", task.choices, columns)
    try:
        example = Example(
            id=_id(task, row),
            task=task.name,
            owners=tuple(dict.fromkeys(owners)),
            prompt=Prompt(text=prompt, system=_filled("system", render, task.system, columns), form=task.form),
            answers=answers,
            extract=task.extract,
            choices=_joined(choices, delimiter),
            gold=_gold(task, columns, choices),
            tests=_filled("tests", render, task.tests, columns),
            metric=task.metric,
            max_tokens=task.max_tokens,
            stop=task.stop,
            n=task.n,
            temperature=task.temperature,
            tags=(*task.tags, *_tags(task, columns)),
        )
    except ValidationError as error:
        raise _BadRow(".".join(map(str, error.errors()[0]["loc"])), error.errors()[0]["msg"]) from error
    if (lacking := METRICS[task.metric].lacks(example)) is not None:
        raise _BadRow("", lacking)
    return example


def _filled(field: str, fill: Callable[[str, Mapping[str, Any]], Any], text: str, columns: Mapping[str, Any]) -> Any:
    try:
        return fill(text, columns)
    except BadTemplate as error:
        raise _BadRow(field, str(error)) from error


def _texts(field: str, told: str | Sequence[str], columns: Mapping[str, Any]) -> tuple[str, ...]:
    """Filled templates, or what an expression gives: a list, or a single thing."""
    if not isinstance(told, str):
        return tuple(_filled(field, render, text, columns) for text in told)
    value = _filled(field, evaluate, told, columns)
    found = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(each, str | int | float) for each in found):
        raise _BadRow(field, f"{str(value)[:80]} is no text and no list of texts")
    return tuple(map(str, found))


def _joined(texts: Sequence[str], delimiter: str) -> tuple[str, ...]:
    """What follows a prompt; text that brings its own space needs none."""
    return tuple(text if text[:1].isspace() else delimiter + text for text in texts)


def _gold(task: Task, columns: Mapping[str, Any], choices: Sequence[str]) -> int | None:
    """The position of the right choice, which may be told by its text."""
    if task.gold is None or isinstance(task.gold, int):
        return task.gold
    gold = _filled("gold", evaluate, task.gold, columns)
    if isinstance(gold, str) and gold in choices:
        return choices.index(gold)
    if not isinstance(gold, int):
        raise _BadRow("gold", f"{gold!r} is no choice and no position; if it is a number as text: `{task.gold} | int`")
    return int(gold)


def _tags(task: Task, columns: Mapping[str, Any]) -> list[str]:
    if missing := [column for column in task.tag_columns if column not in columns]:
        raise _BadRow("tag_columns", f"there is no column '{missing[0]}'; the row has {', '.join(columns['row'])}")
    return [f"{column}:{columns[column]}" for column in task.tag_columns]


def _id(task: Task, row: Row) -> str:
    assert row.columns is not None
    own = row.columns.get(task.id_column) if task.id_column else None
    return f"{task.name}/{row.number if own is None else own}"
