"""`moerge eval`: how good is the routing?"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from eval.compare_cli import compare, gate, table
from eval.report.cli import report
from eval.run_cli import run
from eval.stress_cli import stress
from eval.terminal import fail, out, progress_bar, say, settings_of
from router.encoder import Backend

if TYPE_CHECKING:
    from eval.asking import Tell
    from eval.prompts import Files, Prompts
    from eval.routing import Result, RouterSpec

app = typer.Typer(name="eval", help="Measure how good the routing is.", no_args_is_help=True)

PAIRS = 10  # confusions that the terminal shows; the JSON has all
NAMED = 5  # tasks that a warning names
MARGIN, COLUMN = 17, 23  # characters of the table's first column and of each router's


app.command()(run)
app.command()(report)
app.command()(stress)
for command in (table, compare, gate):
    app.command()(command)


@app.callback()
def evaluate() -> None:
    """Measure how good the routing is."""


@app.command()
def routing(
    register: Annotated[
        list[Path], typer.Option(help="Rows to register experts with, JSONL; repeatable, then they are joined.")
    ],
    test: Annotated[
        list[Path],
        typer.Option(help="Rows to route; repeatable. A file that also registers says which in a column 'split'."),
    ],
    field: Annotated[
        list[str] | None,
        typer.Option(help="Column with the text, 'instance' if not given; repeatable. 'A+B': instruction and input."),
    ] = None,
    register_field: Annotated[
        list[str] | None, typer.Option(help="Of the registering rows, if it is another; repeatable: several forms.")
    ] = None,
    ood_field: Annotated[list[str] | None, typer.Option(help="Of the rows out of domain, if it is another.")] = None,
    description: Annotated[str | None, typer.Option(help="Column of registering rows that tells the task.")] = None,
    ood: Annotated[list[Path] | None, typer.Option(help="Rows that belong to no expert; repeatable.")] = None,
    tasks: Annotated[list[Path] | None, typer.Option(help="A row to a task, with its 'cluster'; repeatable.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="Rows of each task and file to register.")] = 20,
    router: Annotated[
        list[str] | None,
        typer.Option(help="'retrieval' or 'retrieval:scoring=best,k=5'; repeatable. 'all': every one that there is."),
    ] = None,
    far: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Calibrate first, for this false-accept rate; see `moerge router calibrate`."),
    ] = None,
    json_file: Annotated[str | None, typer.Option("--json", metavar="OUT", help="Result as JSON; '-': stdout.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Folder or Hub id; the packaged one if not given.")] = None,
    backend: Annotated[Backend, typer.Option(help="What runs it.")] = "auto",
    resamples: Annotated[int, typer.Option(min=100, help="Of the bootstrap.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap.")] = 0,
    cache: Annotated[bool, typer.Option(help="Keep encodings on disk for the next time.")] = True,
) -> None:
    """Measure routers on text alone: prompts with known tasks, no adapter weights.

    Every figure comes with a 95 % bootstrap interval over tasks.
    """
    from eval.prompts import BadPrompts, Files, read_prompts

    files = Files(
        register=tuple(register),
        test=tuple(test),
        ood=tuple(ood or ()),
        tasks=tuple(tasks or ()),
        fields=tuple(field or ("instance",)),
        register_fields=tuple(register_field or ()),
        ood_fields=tuple(ood_field or ()),
        description=description,
        samples=samples,
    )
    specs = [spec for given in router or default() for spec in specs_of(given)]
    if json_file not in (None, "-"):
        writable(Path(str(json_file)))
    try:
        prompts = read_prompts(files)
    except BadPrompts as error:
        fail(str(error))
    for line in warnings(prompts):
        say(line)
    with progress_bar() as tell:
        results, encoder_id = _measure(specs, prompts, encoder, backend, cache, far, resamples, seed, tell)
    document = {
        "results": [result.json() for result in results],
        "ran": {**ran(files, prompts, encoder_id, resamples, seed), "far": far},
    }
    if json_file == "-":
        typer.echo(json.dumps(document, indent=1, ensure_ascii=False))
        return
    if json_file:
        Path(json_file).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    show(results, prompts)


def _measure(
    specs: Sequence[RouterSpec],
    prompts: Prompts,
    encoder: str | None,
    backend: Backend,
    cache: bool,
    far: float | None,
    resamples: int,
    seed: int,
    tell: Tell,
) -> tuple[list[Result], str]:
    from eval.encodings import Remembering, default_folder
    from eval.routing import CalibrationFailed, measure
    from router.encoder import load_encoder
    from router.errors import RouterError

    try:
        remembering = Remembering(load_encoder(encoder, backend=backend), default_folder() if cache else None)
        remembering.prepare(prompts.texts(), lambda done, total: tell("encoding", done, total))
        each = partial(measure, far=far, resamples=resamples, seed=seed, tell=tell)
        measured = [each(spec, prompts, remembering) for spec in specs]
    except (RouterError, CalibrationFailed) as error:
        fail(str(error))
    return measured, remembering.id


def default() -> list[str]:
    """What plain `auto` is on a server with the default settings."""
    from router.router import RouterSettings

    return [RouterSettings().method]


def specs_of(given: str) -> list[RouterSpec]:
    """The routers that an option names: NAME, NAME:setting=value,..., NAME:{JSON} or `all`."""
    from eval.routing import RouterSpec
    from router.methods import METHODS
    from router.methods.gated import NAMES

    known = [name for name in METHODS if name not in NAMES]
    if given == "all":
        return [RouterSpec(name, name) for name in known]
    name = given.partition(":")[0]
    if name in NAMES:
        fail(
            f"'{name}' weighs experts inside the model, which text alone does not show; measurable: {', '.join(known)}."
        )
    if name not in METHODS:
        fail(f"No router '{name}'. There are: {', '.join(known)}; or all.")
    return [RouterSpec(given, name, settings_of(given))]


def writable(path: Path) -> None:
    if path.is_dir() or not path.resolve().parent.is_dir():
        fail(f"--json {path}: {'a folder' if path.is_dir() else 'its folder does not exist'}; name a file.")


def warnings(prompts: Prompts) -> Iterator[str]:
    """What makes the figures mean less than it seems."""
    if prompts.left_out:
        count = sum(prompts.left_out.values())
        yield f"{count} test prompts are left out: their tasks are not registered ({_some(prompts.left_out)})."
    if prompts.repeated:
        yield f"{prompts.repeated} of {len(prompts.test)} test prompts are samples of their own expert."
    if prompts.clusters and (alone := [task for task in prompts.samples if task not in prompts.clusters]):
        yield f"{len(alone)} tasks have no cluster, and count as one each ({_some(alone)})."


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:NAMED]) + (", ..." if len(shown) > NAMED else "")


def digests(paths: Iterable[Path]) -> list[dict[str, str]]:
    return [{"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()} for path in paths]


def ran(files: Files, prompts: Prompts, encoder_id: str, resamples: int, seed: int) -> dict[str, Any]:
    """What was measured, and with what."""
    from eval.intervals import FEW, LEVEL

    groups = len({task for task, _ in prompts.test})
    return {
        "files": {
            kind: digests(paths)
            for kind, paths in (
                ("register", files.register),
                ("test", files.test),
                ("ood", files.ood),
                ("tasks", files.tasks),
            )
        },
        "field": list(files.fields),
        "register_field": list(files.register_fields or files.fields),
        "ood_field": list(files.ood_fields or files.fields),
        "description": files.description,
        "samples": files.samples,
        "experts": len(prompts.samples),
        "prompts": len(prompts.test),
        "ood_prompts": len(prompts.ood),
        "left_out": dict(prompts.left_out),
        "repeated": prompts.repeated,
        "encoder": encoder_id,
        "intervals": {
            "level": LEVEL,
            "resamples": resamples,
            "seed": seed,
            "drawn": "tasks" if groups >= FEW else "prompts",
        },
        "versions": {
            "python": platform.python_version(),
            **{
                name: metadata.version(name)
                for name in ("moerge", "numpy", "scipy", "scikit-learn", "faiss-cpu", "onnxruntime")
            },
        },
    }


def show(results: Sequence[Result], prompts: Prompts) -> None:
    """The figures, one column to a router, then each router's most frequent confusions."""
    beside = max(1, (out.width - MARGIN) // max([COLUMN, *(len(result.router.name) + 3 for result in results)]))
    for start in range(0, len(results), beside):
        out.print(_figures(results[start : start + beside]))
    counts = f"{len(prompts.test)} prompts of {len(prompts.samples)} experts, {len(prompts.ood)} out of domain"
    out.print(f"{counts}; [low, high]: 95 %", markup=False, highlight=False)
    for result in results:
        if result.confusions:
            pairs = Table("own expert", "ranked first", "prompts", title=f"{result.router.name}: confusions")
            for task, best, count in result.confusions[:PAIRS]:
                pairs.add_row(task, best or "(none)", str(count))
            out.print(pairs)


def _figures(results: Sequence[Result]) -> Table:
    table = Table("", *(result.router.name for result in results))
    for name in dict.fromkeys(name for result in results for name in result.metrics):
        digits = 1 if name.endswith("_ms") else 3
        cells = [result.metrics[name] for result in results]
        table.add_row(name, *(f"{c.value:.{digits}f} [{c.low:.{digits}f}, {c.high:.{digits}f}]" for c in cells))
    return table


if __name__ == "__main__":
    app()
