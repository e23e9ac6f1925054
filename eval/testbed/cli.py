"""`moerge testbed build` and `moerge testbed check`.

PyTorch, transformers and openai are imported by the commands that need them, so that `moerge --help` is quick.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table as RichTable

from eval.testbed.tasks import BY_NAME
from eval.testbed.workers import Report, processes

if TYPE_CHECKING:
    from eval.testbed import check as checking
    from eval.testbed import remote

DATA = Path(__file__).parent / "data"

app = typer.Typer(
    name="testbed",
    help="The quickstart testbed: a small base model and its experts.",
    no_args_is_help=True,
)
_console = Console()
_errors = Console(stderr=True)


@app.command()
def build(
    out: Annotated[Path, typer.Option(help="Folder to build in; a stopped build continues there.")] = Path(
        "build/testbed"
    ),
    seed: Annotated[int, typer.Option(help="Seed of all data and weights.")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes, one core each.")] = 2,
    only: Annotated[list[str] | None, typer.Option(help="Train this expert again; repeatable.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Train at most so many steps each: a trial run.")] = None,
) -> None:
    """Train the base and all experts from scratch, write their data, measure them."""
    from transformers.utils import logging as transformers_logging

    from eval.testbed import build as building

    transformers_logging.disable_progress_bar()
    only = only or []
    unknown = sorted(set(only) - set(BY_NAME))
    if unknown:
        raise typer.BadParameter(f"no expert {', '.join(unknown)}; there are: {', '.join(BY_NAME)}")
    recipe = building.Recipe(seed=seed)
    if steps is not None:
        recipe = recipe.scaled(steps)
    try:
        with _bars() as (training, measured), processes(workers) as crew:
            building.build(out, recipe, crew, retrain=only, report=training, measured=measured)
    except KeyboardInterrupt:
        _errors.print(f"Stopped. The same command continues with what {out} holds.")
        raise typer.Exit(130) from None
    except building.OtherRecipe as error:
        _errors.print(str(error))
        raise typer.Exit(2) from None
    _console.print(f"Built {out}. Its figures: moerge testbed check --data {out}")


@contextmanager
def _bars() -> Iterator[tuple[Report, Report]]:
    """Progress bars: one for each model in training, one for the measurement."""
    columns = (
        TextColumn("{task.description:>20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=_errors) as progress:
        bars: dict[str, TaskID] = {}

        def show(key: str, done: int, total: int, note: str) -> None:
            if key not in bars:
                bars[key] = progress.add_task(key, total=total, note=note)
            progress.update(bars[key], completed=done, note=note)

        yield (
            lambda name, done, total, loss: show(name, done, total, f"loss {loss:.3f}"),
            lambda name, done, total, _: show("measuring", done, total, name),
        )


@app.command()
def check(
    data: Annotated[Path, typer.Option(help="Folder of the testbed.", exists=True)] = DATA,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    endpoint: Annotated[
        str | None, typer.Option(help="Ask a running Moerge server instead, such as http://127.0.0.1:8000/v1")
    ] = None,
    api_key: Annotated[str, typer.Option(envvar="MOERGE_API_KEY", help="For the server.")] = "none",
    workers: Annotated[int, typer.Option(min=1, help="Processes that measure, one core each.")] = 2,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 16,
) -> None:
    """Measure the base, every expert and the expert x task matrix, in process or through a server.

    Ends with status 1 if the testbed, or the server's routing, falls short of what it promises.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    if endpoint is None:
        problems = _check_locally(data, as_json, workers)
    else:
        problems = _check_server(data, as_json, endpoint, api_key, concurrency)
    for problem in problems:
        _errors.print(f"[red]{problem}[/red]")
    raise typer.Exit(1 if problems else 0)


def _check_locally(data: Path, as_json: bool, workers: int) -> list[str]:
    from eval.testbed import check as checking

    with Progress(console=_errors, transient=True) as progress, processes(workers) as crew:
        bar = progress.add_task("measuring", total=len(checking.expert_names(data)) + 1)
        table = checking.measure(data, crew, lambda _: progress.advance(bar))
    problems = table.failures()
    if as_json:
        typer.echo(
            json.dumps(
                {"base_mean": table.base_mean, **table.model_dump(), "own": table.own, "problems": problems},
                indent=1,
            )
        )
    else:
        # As wide as its columns: where the output goes to a file, the matrix must not be cut.
        Console(width=max(_console.width, 180)).print(_matrix(table))
        _console.print(
            f"base exact match {table.base_mean:.3f} (at most {checking.BASE_LIMIT}), "
            f"lowest expert on its own task {min(table.own.values()):.3f} (at least {checking.EXPERT_LIMIT})"
        )
    return problems


def _matrix(table: checking.Table) -> RichTable:
    """Per cent, experts in rows, tasks in numbered columns; what is right by accident is dim."""
    shown = RichTable(title="exact match in %, expert (row) x task (column)", padding=(0, 0), box=None)
    shown.add_column("")
    names = list(table.matrix)
    for i, _ in enumerate(names, 1):
        shown.add_column(str(i), justify="right", min_width=4)
    for i, name in enumerate(names, 1):
        cells = [
            f"[bold]{100 * table.matrix[name][task]:.0f}[/bold]"
            if task == name
            else f"[dim]{100 * table.matrix[name][task]:.0f}[/dim]"
            for task in names
        ]
        shown.add_row(f"{i:>2} {name}", *cells)
    shown.add_row("   base", *(f"{100 * table.base[task]:.0f}" for task in names))
    return shown


def _check_server(data: Path, as_json: bool, endpoint: str, api_key: str, concurrency: int) -> list[str]:
    from openai import AsyncOpenAI, OpenAIError

    from eval.testbed import check as checking
    from eval.testbed import remote
    from eval.testbed.manifest import read_jsonl

    tests = checking.read_tests(data)
    ood = [record["prompt"] for record in read_jsonl(data / "ood.jsonl")]
    told = {name: BY_NAME[name].told for name in tests}

    async def run(advance: remote.Advance) -> remote.Report:
        async with AsyncOpenAI(base_url=endpoint, api_key=api_key) as client:
            return await remote.measure(client, tests, told, ood, concurrency=concurrency, advance=advance)

    try:
        with Progress(console=_errors, transient=True) as progress:
            bar = progress.add_task("asking", total=sum(map(len, tests.values())) + len(ood))
            report = asyncio.run(run(lambda: progress.advance(bar)))
    except* OpenAIError as errors:
        first = errors.exceptions[0]
        _errors.print(f"{endpoint} does not answer: {first}. Is `moerge serve` running there?")
        raise typer.Exit(2) from None
    problems = report.failures()
    if as_json:
        typer.echo(json.dumps({**report.model_dump(), "problems": problems}, indent=1))
    else:
        _console.print(_shares(report))
        _console.print(f"out-of-domain prompts left to the base model: {100 * report.ood_to_base:.1f} %")
    return problems


def _shares(report: remote.Report) -> RichTable:
    shown = RichTable(title="model: auto", box=None)
    for column in ("", "prompts", "routed to its own expert", "answer exactly right"):
        shown.add_column(column, justify="left" if not column else "right")
    for name, share in report.experts.items():
        shown.add_row(name, str(share.prompts), f"{100 * share.routed:.1f} %", f"{100 * share.exact:.1f} %")
    shown.add_section()
    for kind, share in report.told.items():
        row = (str(share.prompts), f"{100 * share.routed:.1f} %", f"{100 * share.exact:.1f} %")
        shown.add_row(f"{kind}-told", *row, style="bold")
    return shown
