"""`moerge eval stress`: does routing hold when experts come twice, are in the way, or are many?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from eval.terminal import fail, out, progress_bar, say
from router.encoder import Backend

if TYPE_CHECKING:
    from eval.prompts import Files, Prompts
    from eval.routing import RouterSpec
    from eval.stress import Row, Samples, Trial


def stress(
    register: Annotated[
        list[Path] | None,
        typer.Option(help="Rows to register experts with, JSONL; repeatable. None: the quickstart's."),
    ] = None,
    test: Annotated[list[Path] | None, typer.Option(help="Rows to route; repeatable.")] = None,
    field: Annotated[
        list[str] | None, typer.Option(help="Column with the text, 'instance' if not given; repeatable.")
    ] = None,
    ood: Annotated[list[Path] | None, typer.Option(help="Rows that belong to no expert; repeatable.")] = None,
    distractors: Annotated[
        list[Path] | None,
        typer.Option(help="Rows of other tasks, each an expert in the way; repeatable. None: made up."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Rows of each task and file to register.")] = 20,
    times: Annotated[int, typer.Option(min=1, help="Distractors for each expert, at most.")] = 10,
    count: Annotated[
        list[int] | None, typer.Option(min=2, help="Experts in one library; repeatable. 5, 17, 50, 150, 500.")
    ] = None,
    router: Annotated[
        list[str] | None,
        typer.Option(help="'retrieval' or 'retrieval:scoring=best,k=5'; repeatable. 'all': every one that there is."),
    ] = None,
    json_file: Annotated[str | None, typer.Option("--json", metavar="OUT", help="Result as JSON; '-': stdout.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Folder or Hub id; the packaged one if not given.")] = None,
    backend: Annotated[Backend, typer.Option(help="What runs it.")] = "auto",
    resamples: Annotated[int, typer.Option(min=100, help="Of the bootstrap.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn: libraries, distractors, the bootstrap.")] = 0,
    cache: Annotated[bool, typer.Option(help="Keep encodings on disk for the next time.")] = True,
) -> None:
    """Put routers under stress: every expert twice, ten distractors to each, more and fewer experts.

    Text alone, as `moerge eval routing`; every figure comes with a 95 % bootstrap interval over tasks.
    """
    from eval import cli
    from eval.prompts import BadPrompts, Files
    from eval.stress import COUNTS, trials

    if bool(register) != bool(test):
        fail("--register and --test go together; without them the quickstart's prompts are taken.")
    files = Files(
        register=tuple(register or ()),
        test=tuple(test or ()),
        ood=tuple(ood or ()),
        fields=tuple(field or ("instance",)),
        samples=samples,
    )
    specs = [spec for given in router or cli.default() for spec in cli.specs_of(given)]
    if json_file not in (None, "-"):
        cli.writable(Path(str(json_file)))
    try:
        prompts, others = _read(files, tuple(distractors or ()))
    except BadPrompts as error:
        fail(str(error))
    for line in cli.warnings(prompts):
        say(line)
    tried = trials(prompts, counts=tuple(count or COUNTS), times=times, distractors=others, seed=seed)
    rows, encoder_id = _measure(specs, prompts, tried, encoder, backend, cache, resamples, seed)
    ran = cli.ran(files, prompts, encoder_id, resamples, seed) | {
        "distractors": cli.digests(distractors or ()),
        "times": times,
    }
    text = json.dumps({"rows": [row.json() for row in rows], "ran": ran}, indent=1, ensure_ascii=False)
    if json_file == "-":
        typer.echo(text)
        return
    if json_file:
        Path(json_file).write_text(text + "\n", encoding="utf-8")
    for spec in specs:
        out.print(table(spec.name, [row for row in rows if row.router == spec.name]))
    told = f"{len(prompts.test)} prompts, {len(prompts.ood)} out of domain; [low, high]: 95 %"
    out.print(told, markup=False, highlight=False)


def _measure(
    specs: Sequence[RouterSpec],
    prompts: Prompts,
    tried: Sequence[Trial],
    encoder: str | None,
    backend: Backend,
    cache: bool,
    resamples: int,
    seed: int,
) -> tuple[list[Row], str]:
    """The rows of every router, and the encoder's id."""
    from eval.encodings import Remembering, default_folder
    from eval.stress import stress as measure
    from router.encoder import load_encoder
    from router.errors import RouterError

    with progress_bar() as tell:
        try:
            remembering = Remembering(load_encoder(encoder, backend=backend), default_folder() if cache else None)
            sampled = (
                text for trial in tried for part in trial.parts for texts in part.samples.values() for text in texts
            )
            texts = list(dict.fromkeys([*prompts.texts(), *sampled]))
            remembering.prepare(texts, lambda done, total: tell("encoding", done, total))
            each = partial(measure, resamples=resamples, seed=seed, tell=tell)
            return [row for spec in specs for row in each(spec, prompts, remembering, tried)], remembering.id
        except RouterError as error:
            fail(str(error))


def _read(files: Files, distractors: tuple[Path, ...]) -> tuple[Prompts, Samples]:
    """The prompts, and the samples of tasks that are only in the way. Raises BadPrompts."""
    from eval.prompts import read_prompts, read_samples
    from eval.routebench import quickstart_set

    prompts = read_prompts(files) if files.register else quickstart_set()
    others = read_samples(replace(files, register=distractors, test=())) if distractors else {}
    return prompts, {task: texts for task, texts in others.items() if texts}


def table(name: str, rows: Sequence[Row]) -> Table:
    """A row to a trial; of the control, by how much the share of rightly routed prompts changed."""
    from eval.table_text import estimate

    shown = [metric for metric in rows[0].metrics if metric != "top3"]
    found = Table("trial", "experts", *shown, "routed, change", title=name)
    for row in rows:
        cells = [estimate(row.metrics[metric], 1 if metric.endswith("_ms") else 3) for metric in shown]
        change = estimate(row.change, sign="+")
        beside = f"{row.trial} (to: {row.control})" if row.control not in (None, "all") else row.trial
        found.add_row(beside, str(row.experts), *cells, change)
    return found
