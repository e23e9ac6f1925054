"""A suite: experts, tasks to ask them, and the routers to compare. Plain data; `eval.suite_file` reads it from YAML."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from adapters_registry.manifest import BaseRef
from adapters_registry.proposal import FolderSource, Proposal
from eval.asking import Frozen
from eval.recipe import Recipe
from eval.records import REGIMES, Regime

Name = Annotated[str, Field(pattern=r"^\S(.*\S)?$", max_length=100)]


class BadSuite(Exception):
    """`problems` are `file:line: field: what is wrong`, one for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))


class Data(Frozen):
    """Where rows come from: a file or folder (`path`, absolute once read), a data set of the Hub, or one that everybody
    has to get for themselves: `given` is what they call it (`--data NAME=PATH`), `source` where it is from.
    """

    path: str | None = None
    hub: Annotated[str, Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")] | None = None
    given: Annotated[str, Field(pattern=r"^[\w./-]+$")] | None = None
    source: str = ""
    config: str | None = None
    split: str | None = None
    revision: str | None = None

    @model_validator(mode="after")
    def _from_one_place(self) -> Self:
        if sum(each is not None for each in (self.path, self.hub, self.given)) != 1:
            raise ValueError("needs exactly one of `path` (a file or folder), `hub` (org/name) and `given` (--data)")
        if self.hub is not None and self.split is None:
            raise ValueError("a data set of the Hub has splits; name one (split: test)")
        return self

    def __str__(self) -> str:
        about = ", ".join(filter(None, (self.config, self.split)))
        return f"{self.path or self.hub or self.given}" + (f" ({about})" if about else "")


class Task(Frozen):
    """What is asked about, and what is right. *Template*: Jinja2 over the columns of a row, `{{ question }}`;
    *expression*: Jinja2 without the braces, which may give a list or a number, `choices.label.index(answerKey)`.

    expert, experts  who the prompts were made for, in turn; templates; "all": whoever is best; none: out of domain
    answer, answers  right answers: a template, templates, or an expression that gives a list
    extract          a regular expression: of what is answered only its last match counts
    choices, gold    continuations to choose among, templates or an expression; the right one's position, from 0, or
                     its text, an expression
    delimiter        put before a continuation that does not begin with a space; " " for completions, "" for chats
    tests            program text that fails unless the answer before it is right; a template
    stop, n, temperature  of generation
    tags, tag_columns     to slice results by: always these; these columns' values, as `column:value`
    id_column        whose values are the examples' ids, if the rows have it; null: the rows' numbers
    where            rows for which this expression holds
    limit            examples at most
    shuffle          the seed of the order in which rows are read; null: as they come
    on_bad_row       error: a row that cannot be used ends it; skip: it is left out, and named
    each             the value of `{{ each }}`, where one entry of a suite stands for several tasks
    place            `file:line` of the entry
    """

    name: Name
    experts: tuple[str, ...] = ()
    data: Data
    form: Literal["chat", "completion"] = "chat"
    prompt: str = "{{ prompt }}"
    system: str = ""
    answers: str | tuple[str, ...] = ()
    extract: str = ""
    choices: str | tuple[str, ...] = ()
    gold: int | str | None = None
    delimiter: str | None = None
    tests: str = ""
    metric: str = "exact_match"
    max_tokens: PositiveInt = 64
    stop: tuple[str, ...] = ()
    n: PositiveInt = 1
    temperature: float = Field(default=0.0, ge=0)
    tags: tuple[str, ...] = ()
    tag_columns: tuple[str, ...] = ()
    id_column: str | None = "id"
    where: str | None = None
    limit: PositiveInt | None = None
    shuffle: Annotated[int, Field(ge=0)] | None = None
    on_bad_row: Literal["error", "skip"] = "error"
    each: str | None = None
    place: str = ""

    @property
    def owners(self) -> tuple[str, ...]:
        """The experts that all of its rows are for; none where the rows say it."""
        return () if any("{{" in name or "{%" in name for name in self.experts) else self.experts


class Blend(Frozen):
    """One blend for all prompts; `experts` with equal weights that add up to 1, unless they have weights."""

    experts: Literal["all"] | tuple[str, ...] | dict[str, float] = "all"
    operator: str = "cat"
    settings: dict[str, Any] = Field(default_factory=dict)

    def recipe(self, names: Sequence[str]) -> Recipe:
        """Of those of its experts that are among `names`; without weights they share what there is.

        So do settings that are told by member (the layers of `layer_swap`).
        """
        if isinstance(self.experts, Mapping):
            weights = {name: weight for name, weight in self.experts.items() if name in names}
        else:
            members = [name for name in names if self.experts == "all" or name in self.experts]
            weights = {name: 1 / len(members) for name in members}
        settings = {
            key: {name: each for name, each in told.items() if name in weights} if isinstance(told, Mapping) else told
            for key, told in self.settings.items()
        }
        return Recipe.blend(weights, self.operator, settings)


class RouterEntry(Frozen):
    """A row of the tables: exactly one of a routing `method` with its settings, the `model` of an endpoint that
    routes by itself ("auto", "auto:arrow"; in-distribution only), and one `blend` for all prompts.
    """

    name: Name
    about: str = ""
    family: str = ""
    method: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    model: str | None = None
    blend: Blend | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if sum(each is not None for each in (self.method, self.model, self.blend)) != 1:
            raise ValueError("needs exactly one of `method`, `model` and `blend`")
        if self.settings and self.method is None:
            raise ValueError("`settings` are a method's; a blend has its own (`blend: {settings: ...}`)")
        return self


class Suite(Frozen):
    """Everything that a run is told, checked, with nothing left to look up but the data.

    manifest     the file of the base model and the experts; None: they stand in the suite itself
    baseline     the row that others are compared with: a router's name or a reference's (`eval.records.REFERENCES`)
    seeds        of what is drawn: random experts, random weights, sampled answers
    limit        examples of each task at most
    engine       settings of the server that is started, its section `engine`
    statistics   of the experts, measured before: "gram" for `regmean`, "fisher" for `fisher`
    concurrency  questions asked at the same time
    minutes      after which the run ends, incomplete
    warnings     what is allowed, but hardly meant
    """

    name: Name
    description: str = ""
    path: Path
    manifest: Path | None = None
    base_model: BaseRef
    experts: tuple[Proposal, ...]
    tasks: tuple[Task, ...]
    routers: tuple[RouterEntry, ...] = ()
    regimes: tuple[Regime, ...] = REGIMES
    baseline: str = "best-single"
    seeds: tuple[int, ...] = (0,)
    limit: PositiveInt | None = None
    engine: dict[str, Any] = Field(default_factory=dict)
    statistics: tuple[Literal["gram", "fisher"], ...] = ()
    concurrency: PositiveInt = 16
    minutes: float | None = Field(default=None, gt=0)
    warnings: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The experts' names, in the order of the manifest."""
        return tuple(expert.name for expert in self.experts)

    @property
    def digest(self) -> str:
        """sha256 (hex) of what it says, wherever it lies; data and adapters count by their names."""
        told = self.model_dump(mode="json", exclude={"path", "manifest", "experts", "warnings"})
        told["base_model"] = (self.base_model.name, Path(self.base_model.model).name, self.base_model.revision)
        told["experts"] = [_content(expert) for expert in self.experts]
        for task in told["tasks"]:
            del task["place"]
            if task["data"]["path"]:
                task["data"]["path"] = Path(task["data"]["path"]).name
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _content(expert: Proposal) -> dict[str, Any]:
    source = expert.source
    told = expert.model_dump(mode="json", exclude={"source"})
    return told | {"source": source.path.name if isinstance(source, FolderSource) else source.model_dump(mode="json")}


def shipped() -> dict[str, Path]:
    """The suites that come along, by name."""
    folder = Path(str(resources.files("eval"))) / "suites"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_suite(given: str | Path, *, manifest: Path | None = None) -> Suite:
    """The suite in a file, or one that comes along, by its name; `manifest` takes the place of its own.

    Raises BadSuite with every problem.
    """
    from eval.suite_file import read

    path = Path(given)
    known = shipped()
    if str(given) in known and not path.is_file():
        path = known[str(given)]
    elif not path.exists() and path.suffix not in (".yaml", ".yml"):
        raise BadSuite([f"There is no file {given}, and no suite of that name. There are: {', '.join(known)}."])
    return read(path, manifest)
