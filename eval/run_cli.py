"""`moerge eval run`: a suite, its routers and the rows that every run has, on a real engine."""

from __future__ import annotations

import asyncio
import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from eval.terminal import INCOMPLETE, INTERRUPTED, fail, progress_bar, say, settings_of

if TYPE_CHECKING:
    from adapters_registry.expert import Expert
    from eval.asking import Tell
    from eval.engines import Chosen
    from eval.examples import Example
    from eval.records import Run, TaskInfo
    from eval.suite import RouterEntry, Suite

UNCUT = 512  # the largest rank of an engine, where it is not known


def run(
    suite: Annotated[str, typer.Argument(help="A suite's file, or the name of one that comes along.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the run and its report; runs/SUITE when not given.")
    ] = None,
    manifest: Annotated[Path | None, typer.Option(help="Base model and experts, instead of the suite's.")] = None,
    router: Annotated[
        list[str] | None,
        typer.Option(help="Only this router of the suite, or 'retrieval:top_k=3': one of its own; repeatable."),
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="Only this task; repeatable.")] = None,
    regime: Annotated[list[str] | None, typer.Option(help="Only in-distribution, semi-ood or ood; repeatable.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task at most.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="End after so long, with what there is.")] = None,
    baseline: Annotated[str | None, typer.Option(help="The row that the others are compared with.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="A file or folder for a data set; repeatable.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="Ask this OpenAI endpoint instead of a server of its own.")
    ] = None,
    api_key: Annotated[str | None, typer.Option(envvar="MOERGE_API_KEY", help="The endpoint's.")] = None,
    engine: Annotated[
        Literal["served", "peft"], typer.Option(help="A server of its own; or Transformers and PEFT, slowly.")
    ] = "served",
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run programs that a model has written, in a sandbox.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and check everything, ask nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """Evaluate routers, blends and gates on tasks, against the rows that every run has.

    A run that was interrupted or killed goes on where it was when the same command is given again.
    Leaves with 2 for what cannot be run, 3 for a run that lacks something.
    """
    if endpoint and engine != "served":
        fail("--endpoint and --engine peft are two different engines: give only one.")
    out = out or Path("runs") / Path(suite).stem
    try:
        found, examples, tasks = read(suite, manifest, router, task, regime, limit, minutes, baseline, data)
        if dry_run:
            dry(found, examples, tasks)
            return
        told = {"limit": found.limit, "only": list(task or ())}
        done = answered(found, examples, tasks, out, endpoint, api_key, engine, allow_code, told)
        finish(out, done, as_json)
    except KeyboardInterrupt:
        say(f"Interrupted. What was answered is kept in {out}: the same command goes on from there.", "yellow")
        raise typer.Exit(INTERRUPTED) from None


def read(
    given: str,
    manifest: Path | None,
    routers: Sequence[str] | None,
    only: Sequence[str] | None,
    regimes: Sequence[str] | None,
    limit: int | None,
    minutes: float | None,
    baseline: str | None,
    data: Sequence[str] | None,
) -> tuple[Suite, Sequence[Example], Sequence[TaskInfo]]:
    """The suite as the options have it, and its examples."""
    from eval.extra import ExtraMissing
    from eval.reading import BadData, examples_of
    from eval.suite import BadSuite, read_suite

    try:
        suite = read_suite(given, manifest=manifest)
        suite = chosen(suite, routers or (), regimes or (), limit, minutes, baseline)
        with progress_bar() as tell:
            examples, tasks = examples_of(suite, limit=limit, tasks=only, local=places(data or ()), tell=tell)
    except (BadSuite, BadData, ExtraMissing) as error:
        fail(str(error))
    for warning in suite.warnings:
        say(warning)
    return suite, examples, tasks


def answered(
    suite: Suite,
    examples: Sequence[Example],
    tasks: Sequence[TaskInfo],
    out: Path,
    endpoint: str | None,
    api_key: str | None,
    engine: str,
    allow_code: bool,
    told: dict[str, Any],
) -> Run:
    """The run, written to `out`. Ends the command for what cannot be run."""
    from adapters_registry.errors import RegistryError
    from eval.asking import EngineGone
    from eval.cache import CACHE, Cache, CacheFailed
    from eval.deciding import NotAskable
    from eval.encodings import Remembering, default_folder
    from eval.engines import Unsuitable
    from eval.extra import ExtraMissing
    from eval.runner import BadRun, Setup
    from eval.runner import run as run_it
    from router.encoder import load_encoder
    from router.errors import RouterError

    try:
        with locked(out, suite), progress_bar() as tell, Cache(out / CACHE, say) as cache:
            tell("looking at the experts", 0, 0)
            experts = experts_of(suite)
            answering = answerer(suite, experts, out, endpoint, api_key, engine, tell)
            setup = Setup(
                suite=suite,
                experts=experts,
                examples=examples,
                tasks=tasks,
                encoder=Remembering(load_encoder(), default_folder()),
                engine_id=answering.id,
                random=answering.random,
                **costs(suite, experts, answering),
                resident=answering.resident,
                max_rank=answering.max_rank,
                minutes=suite.minutes,
                allow_code=allow_code,
                settings=told | about(suite, answering),
            )
            return run_it(setup, answering.open, cache, out, tell)
    except EngineGone as error:
        fail(f"Nothing was answered: {error}", INCOMPLETE)
    except (BadRun, NotAskable, Unsuitable, CacheFailed, RegistryError, RouterError, ExtraMissing, OSError) as error:
        fail(str(error))


def experts_of(suite: Suite) -> list[Expert]:
    """With their files, fetched from the Hub where they are there. Ends the command for what is no adapter."""
    from safetensors import SafetensorError

    from adapters_registry.hub import Hub
    from eval.deciding import known_experts

    try:
        return known_experts(suite.experts, Hub())
    except (OSError, ValueError, SafetensorError) as error:
        fail(f"An expert cannot be read: {error}")


def chosen(
    suite: Suite,
    routers: Sequence[str],
    regimes: Sequence[str],
    limit: int | None,
    minutes: float | None,
    baseline: str | None,
) -> Suite:
    """The suite with what the options say. Ends the command for what there is not."""
    from eval.records import EXPERT, REFERENCES, REGIMES

    changes: dict[str, Any] = {}
    if routers:
        changes["routers"] = tuple(entry_of(suite, given) for given in routers)
    if unknown := [each for each in regimes if each not in suite.regimes]:
        known = ", ".join(suite.regimes)
        fail(
            f"--regime {unknown[0]}: {'not in this suite' if unknown[0] in REGIMES else 'no such regime'}; has {known}."
        )
    if regimes:
        changes["regimes"] = tuple(each for each in suite.regimes if each in regimes)
    if limit is not None:
        changes["limit"] = min(limit, suite.limit or limit)
    if minutes:
        changes["minutes"] = minutes
    rows = [*REFERENCES, *(each.name for each in changes.get("routers", suite.routers))]
    rows += [f"{EXPERT}{name}" for name in suite.names]
    if baseline is not None and baseline not in rows:
        fail(f"--baseline {baseline}: there is no such row. There are: {', '.join(rows)}.")
    if baseline is not None or suite.baseline not in rows:
        changes["baseline"] = baseline or "best-single"
    return suite.model_copy(update=changes)


def entry_of(suite: Suite, given: str) -> RouterEntry:
    """A router of the suite by its name, or a method: NAME, NAME:setting=value,... or NAME:{JSON}."""
    from eval.suite import RouterEntry
    from router.methods import METHODS
    from router.methods.gated import NAMES

    known = {entry.name: entry for entry in suite.routers}
    if given in known:
        return known[given]
    name = given.partition(":")[0]
    if name not in METHODS:
        fail(
            f"--router {given}: the suite has no such router, and there is no such method. It has: {', '.join(known)}."
        )
    settings = settings_of(given)
    family = "gate" if name in NAMES else "mixture" if settings.get("top_k", 1) > 1 else "selection"
    return RouterEntry(name=given, family=family, method=name, settings=settings)


def places(given: Sequence[str]) -> dict[str, Path]:
    found = {}
    for each in given:
        name, equals, path = each.partition("=")
        if not equals or not Path(path).exists():
            fail(f"--data {each}: give NAME=PATH, with a file or folder that exists.")
        found[name] = Path(path)
    return found


def answerer(
    suite: Suite,
    experts: Sequence[Expert],
    out: Path,
    endpoint: str | None,
    api_key: str | None,
    engine: str,
    tell: Tell,
) -> Chosen:
    from eval.engines import in_process, own_server, somewhere

    if endpoint:
        return asyncio.run(somewhere(suite, experts, endpoint, api_key))
    if engine == "peft":
        return in_process(suite, experts, out / "server")
    return own_server(suite, experts, out / "server", tell)


def costs(suite: Suite, experts: Sequence[Expert], answering: Chosen) -> dict[str, Any]:
    """What a token costs, and the sizes of adapters."""
    from eval.flops import Flops, lora_parameters

    folders = {each.name: each.path for each in experts}
    base, max_rank = suite.base_model, answering.max_rank or UNCUT
    flops = Flops(base.model, {**folders, **answering.folders}, revision=base.revision, max_rank=max_rank)
    return {"flops": flops.of, "parameters": {name: lora_parameters(path) for name, path in folders.items()}}


def about(suite: Suite, answering: Chosen) -> dict[str, Any]:
    """What was run, for a reader of the run; nothing that differs when it is run again."""
    from eval.served import versions

    return {
        "seeds": list(suite.seeds),
        "statistics": list(suite.statistics),
        "concurrency": suite.concurrency,
        "engine": dict(answering.about),
        "versions": versions(),
    }


def dry(suite: Suite, examples: Sequence[Example], tasks: Sequence[TaskInfo]) -> None:
    """What would be run."""
    from eval.records import REFERENCES

    owned = sum(bool(each.owners) for each in examples)
    rows = len(REFERENCES) + len(suite.routers)
    records = (
        sum(rows * (len(examples) if regime == "in-distribution" else owned) for regime in suite.regimes)
        + len(suite.experts) * owned
    )
    for info in tasks:
        left = f", {len(info.left_out)} left out" if info.left_out else ""
        typer.echo(f"{info.name}: {info.examples} examples, {info.metric}{left}")
    typer.echo(
        f"{suite.name}: {len(suite.experts)} experts of {suite.base_model.name}, {len(tasks)} tasks, {len(examples)} "
        f"examples, {len(suite.routers)} routers and {len(REFERENCES)} references, {', '.join(suite.regimes)}: "
        f"{records} records."
    )


def finish(out: Path, done: Run, as_json: bool) -> None:
    """Table, report, and the exit code."""
    from eval.records import read_records
    from eval.report import HTML, NO_PAGE, write_report
    from eval.table import table
    from eval.table_text import markdown

    made = table(done, read_records(out))
    if as_json:
        typer.echo(json.dumps(made.json(), indent=1, ensure_ascii=False))
    else:
        typer.echo(markdown(made))
    with progress_bar() as tell:
        page = write_report(out, tell, made)[0]
    say(f"The report: {page}" if page.name == HTML else f"The report: {page}. {NO_PAGE}")
    if not done.complete:
        for line in done.missing[:10]:
            say(f"Missing: {line}", "red")
        say("The run is incomplete. The same command asks again for what is missing.", "red")
        raise typer.Exit(INCOMPLETE)


@contextmanager
def locked(out: Path, suite: Suite) -> Iterator[None]:
    """The folder is ours for the block; ends the command when it is another's, or another suite's."""
    from eval.records import NotARun, read_run

    out.mkdir(parents=True, exist_ok=True)
    try:
        before = read_run(out)
    except NotARun:
        before = None
    if before is not None and before.suite != suite.name:
        fail(f"{out} holds a run of the suite '{before.suite}', and this is '{suite.name}': give another --out.")
    with (out / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fail(f"Another run writes to {out}: wait for it, or give another --out.")
        yield
