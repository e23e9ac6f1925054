"""What a run leaves behind: `run.json` says what was run, `samples.jsonl` what came of every prompt under every router.

Tables, reports and comparisons are made of these two alone, so that a new slice needs no new run. `examples.jsonl`, the
prompts themselves and what is right, is for readers of a report; it may be absent.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field

from eval.asking import Frozen
from eval.examples import Example

Row = TypeVar("Row", bound=Frozen)
Regime = Literal["in-distribution", "semi-ood", "ood"]
REGIMES: tuple[Regime, ...] = ("in-distribution", "semi-ood", "ood")

RUN, SAMPLES, EXAMPLES = "run.json", "samples.jsonl", "examples.jsonl"

#: Rows that every run has, whatever its routers, in the order of tables.
REFERENCES = {
    "base": "the base model alone",
    "oracle": "each prompt's own expert; of a composition the best of its experts",
    "best-per-query": "whichever single expert, or the base model, does best on the prompt",
    "random": "an expert drawn at random",
    "best-single": "the one expert that does best over all of these prompts",
    "uniform": "all experts (64 of them at most) with equal weights, merged by cat",
    "random-weights": "an adapter with random weights as large as the experts'",
}


#: Before an expert's name: the row of that expert on every prompt.
EXPERT = "expert:"


class Record(Frozen):
    """One prompt under one router, in one regime.

    router      its name; a reference row's; or `expert:NAME` for an expert on every prompt
    kind        of the recipe that answered (`eval.recipe`)
    experts     who answered, with weights; none: the base model
    ranked      the best candidates, best first, five at most; none for rows that rank nobody
    rank        of the prompt's own expert among all candidates, from 1; 0: it is none of them
    score       None: there is no answer (`error` says why), or nothing to be right about
    length      characters of the prompt
    adapter     what the engine had to have loaded: an expert's name, a blend's or a composite's key; "": nothing
    flops       of one token through the model and what is on it; None: not known
    route_ms    to the decision; answer_ms: to the last token, beside all that was asked at the same time
    """

    router: str
    regime: Regime
    seed: int = 0
    example: str
    task: str
    owners: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    length: int = 0
    metric: str = "none"
    kind: str = "base"
    experts: tuple[tuple[str, float], ...] = ()
    ranked: tuple[str, ...] = ()
    rank: int = 0
    confidence: float | None = None
    score: float | None = None
    answer: str = ""
    error: str | None = None
    adapter: str = ""
    flops: float | None = None
    route_ms: float | None = None
    answer_ms: float | None = None
    prompt_tokens: int = 0
    tokens: int = 0


class RouterInfo(Frozen):
    """A row; `family` groups rows in tables: selection, mixture, operator, gate, ..."""

    name: str
    kind: Literal["reference", "router", "expert"] = "router"
    family: str = "selection"
    about: str = ""
    settings: dict[str, Any] = Field(default_factory=dict)


class ExpertInfo(Frozen):
    name: str
    digest: str = ""
    rank: int = 0
    parameters: int = 0


class TaskInfo(Frozen):
    """`examples` are those that were asked; `left_out` rows that could not be, with the reason."""

    name: str
    metric: str
    owners: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    examples: int = 0
    left_out: tuple[str, ...] = ()


class Run(Frozen):
    """expected   records that a complete run has
    complete   whether all of them are there, each with a score where there is something to be right about
    missing    what is not there, in words, one entry to each thing; empty when complete
    resident   adapters that the engine keeps loaded
    settings   everything else that was run: limit, seeds, versions, engine, generation
    """

    suite: str
    digest: str
    base: str = ""
    experts: tuple[ExpertInfo, ...] = ()
    tasks: tuple[TaskInfo, ...] = ()
    routers: tuple[RouterInfo, ...] = ()
    regimes: tuple[Regime, ...] = REGIMES
    baseline: str = "best-single"
    expected: int = 0
    complete: bool = False
    missing: tuple[str, ...] = ()
    resident: int = 64
    traces: tuple[dict[str, Any], ...] = ()
    settings: dict[str, Any] = Field(default_factory=dict)


class NotARun(Exception):
    """A folder that does not hold what a run leaves behind, or not in a form that can be read."""


def write_run(folder: Path, run: Run, records: Iterable[Record], examples: Iterable[Example] = ()) -> None:
    """The samples first, so that a folder with `run.json` has all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in ((EXAMPLES, examples), (SAMPLES, records)):
        part = folder / f"{name}.part"
        with part.open("w", encoding="utf-8") as file:
            file.writelines(row.model_dump_json() + "\n" for row in rows)
        part.replace(folder / name)
    part = folder / f"{RUN}.part"
    part.write_text(json.dumps(run.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(folder / RUN)


def read_run(folder: Path) -> Run:
    """Raises NotARun."""
    try:
        return Run.model_validate_json((folder / RUN).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NotARun(f"{folder} holds no {RUN}: is it the folder of `moerge eval run --out`?") from error
    except (OSError, ValueError) as error:
        raise NotARun(f"{folder / RUN}: {error}") from error


def read_records(folder: Path) -> Iterator[Record]:
    """Raises NotARun, with the line."""
    return _rows(folder / SAMPLES, Record)


def read_examples(folder: Path) -> Iterator[Example]:
    """Nothing where the prompts were not kept. Raises NotARun, with the line."""
    path = folder / EXAMPLES
    return _rows(path, Example) if path.exists() else iter(())


def _rows(path: Path, kind: type[Row]) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield kind.model_validate_json(line)
                except ValueError as error:
                    raise NotARun(f"{path}:{number}: {error}") from error
    except OSError as error:
        raise NotARun(f"{path}: {error.strerror}") from error
