"""The tasks of a suite's file: defaults filled in, lists expanded, templates and metrics checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from adapters_registry.lines import Where, YamlFile
from eval import templates
from eval.expanding import expansions, filled
from eval.suite import Data, Task
from eval.templates import BadTemplate

#: What a metric reads of an example (`Metric.needs`), as fields of a task.
NEEDS: dict[str, tuple[str, ...]] = {
    "text": ("answers",),
    "choices": ("choices", "gold"),
    "likelihood": ("answers",),
    "code": ("tests",),
    "nothing": (),
}
#: Of a task that is out of domain nothing is asked, so nothing is right.
NOBODYS = {"metric": "none", "answers": (), "choices": (), "gold": None, "tests": ""}
_ONE_OF_MANY = ("expert", "answer")  # written `expert: x` for `experts: [x]`


def tasks_of(
    file: YamlFile, defaults: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> Iterator[Task]:
    """`names` are the experts; none: they could not be read. Problems are added to the file's."""
    seen: set[str] = set()
    for index, entry in enumerate(entries):
        where: Where = ("tasks", index)
        for one in _ONE_OF_MANY:
            if one in entry and f"{one}s" in entry:
                file.problem((*where, one), f"give `{one}` or `{one}s`, not both")
        merged = _merged(_plain(defaults), _plain(entry))
        for each in expansions(file, merged.pop("each", None), where):
            before = len(file.problems)
            task = _Entry(file, where, entry, defaults, names).task(merged, each)
            if len(file.problems) > before or task is None:
                break
            if task.name in seen:
                file.problem((*where, "name"), f"there are two tasks called '{task.name}'")
            seen.add(task.name)
            yield task


class _Entry:
    def __init__(
        self,
        file: YamlFile,
        where: Where,
        entry: Mapping[str, Any],
        defaults: Mapping[str, Any],
        names: Sequence[str],
    ) -> None:
        self._file = file
        self._where = where
        self._entry = entry
        self._defaults = defaults
        self._names = names

    def task(self, merged: Mapping[str, Any], each: str | None) -> Task | None:
        told = dict(merged) | {"each": each, "place": self._file.place(self._where)}
        try:
            told |= {key: filled(told[key], each) for key in ("name", "data", "tags") if key in told}
            if isinstance(told.get("experts"), list):
                told["experts"] = [_owner(owner, each) for owner in told["experts"]]
        except BadTemplate as error:
            self._problem((), str(error))
            return None
        if told.get("experts") == "all":
            told["experts"] = self._names or ["all"]
        try:
            task = Task.model_validate(told)
        except ValidationError as error:
            for refused in error.errors():
                self._problem(refused["loc"], refused["msg"].removeprefix("Value error, "))
            return None
        self._check(task)
        task = task.model_copy(update={"data": self._data(task.data)})
        return task if task.experts else task.model_copy(update=dict(NOBODYS))

    def _check(self, task: Task) -> None:
        for field, text, expression in texts_of(task):
            try:
                templates.check(text, expression=expression)
            except BadTemplate as error:
                self._problem((field,), str(error))
        for owner in task.owners:
            if self._names and owner not in self._names:
                self._problem(("experts",), f"there is no expert '{owner}'; there are: {', '.join(self._names)}")
        if task.experts:
            self._metric(task)
        elif self._entry.get("metric", "none") != "none":
            self._problem(
                ("metric",),
                "nothing is asked of a task that is nobody's; if it is nobody's in particular, write `experts: all`",
            )

    def _metric(self, task: Task) -> None:
        from eval.scoring import METRICS

        if task.metric not in METRICS:
            self._problem(("metric",), f"there is no metric '{task.metric}'; there are: {', '.join(METRICS)}")
            return
        if METRICS[task.metric].needs == "likelihood" and task.choices and task.gold is not None:
            return  # the right choice is the answer
        for field in NEEDS[METRICS[task.metric].needs]:
            if getattr(task, field) in ((), "", None):
                name = "answer" if field == "answers" else field
                self._problem(("metric",), f"{task.metric} needs `{name}`, which the task does not have")

    def _data(self, data: Data) -> Data:
        if data.path is None:
            return data
        path = (self._file.folder / Path(data.path).expanduser()).resolve()
        if not path.exists():
            self._problem(("data",), f"there is no {path}; for a data set of the Hub write {{hub: org/name}}")
        return data.model_copy(update={"path": str(path)})

    def _problem(self, field: Where, message: str) -> None:
        """On the line of the entry's field, or of the default that it has."""
        first = str(field[0]) if field else ""
        spellings = (first, first.removesuffix("s"))
        for where, told in ((self._where, self._entry), (("defaults",), self._defaults)):
            if written := [name for name in spellings if name in told]:
                self._file.problem((*where, written[0], *field[1:]), message)
                return
        self._file.problem((*self._where, *field), message)


def texts_of(task: Task) -> Iterator[tuple[str, str, bool]]:
    """The field, the text, and whether it is an expression, of all that is filled from a row."""
    for field in ("prompt", "system", "tests"):
        yield field, getattr(task, field), False
    for field in ("experts", "answers", "choices"):
        value = getattr(task, field)
        if isinstance(value, str):
            yield field, value, True
        else:
            yield from ((field, text, False) for text in value)
    for field in ("gold", "where"):
        if isinstance(value := getattr(task, field), str):
            yield field, value, True


def _plain(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The same with `expert` and `answer` as lists, and `data` as a mapping."""
    told = dict(entry)
    for one in _ONE_OF_MANY:
        if one in told:
            told[f"{one}s"] = [told.pop(one)]
    if isinstance(told.get("data"), str):
        told["data"] = {"path": told["data"]}
    return told


def _merged(defaults: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """Data is completed field by field, unless it is from elsewhere; tags add up."""
    told = {**defaults, **entry}
    ours, theirs = entry.get("data"), defaults.get("data")
    if isinstance(ours, dict) and isinstance(theirs, dict) and not ours.keys() & {"path", "hub"}:
        told["data"] = {**theirs, **ours}
    if isinstance(entry.get("tags"), list) and isinstance(defaults.get("tags"), list):
        told["tags"] = [*defaults["tags"], *entry["tags"]]
    return told


def _owner(owner: Any, each: str | None) -> Any:
    """Filled in, unless rows say who it is."""
    if isinstance(owner, str) and not templates.names(owner) - {"each"}:
        return filled(owner, each)
    return owner
