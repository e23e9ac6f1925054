"""Routers on a folder of real prompts, and the targets set for them.

    python -m eval.routebench ../shared/routebench [--half tune|report|all] [--router NAME ...] [--only SET]

`ni150` is natural-instructions in three forms (the bare input, with a sentence of the instruction, with all of it),
with prompts of tasks that are not registered as the out-of-domain ones; `flan48` and `paraphrase` have requests to a
voice assistant instead. The quickstart testbed is measured, too. Defaults of routing methods were chosen on the
`tune` half (every other task, every other out-of-domain prompt); what is reported is the other half.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from eval.cli import specs_of
from eval.encodings import Remembering, default_folder
from eval.prompts import Files, Prompts, read_prompts
from eval.routing import Result, measure
from eval.terminal import progress_bar
from router.encoder import Backend, load_encoder
from router.text import JOINT

Half = Literal["tune", "report", "all"]
QUICKSTART = "quickstart, instruction-told"
FORMS = ("instance", "brief", "instruct")
SPOKEN = ("clinc_", "hwu_")  # requests to a voice assistant
SHOWN = ("top1", "top3", "cluster_top1", "routed", "abstained", "auroc", "fpr95", "false_accepts", "ece")

#: What a router should reach: set, metric, least or (for milliseconds) most.
TARGETS: dict[str, dict[str, float]] = {
    "ni150 instance": {"top1": 0.63, "top3": 0.86, "cluster_top1": 0.88, "auroc": 0.95},
    "ni150 brief, all forms registered": {"top1": 0.93},
    "ni150 instance, 5 samples": {"top1": 0.55},
    "ni150 instance, 1 sample": {"top1": 0.40},
    "flan48": {"top1": 0.90},
    "paraphrase": {"top1": 0.93},
    "552 experts, ni150 instance": {"top1": 0.60},
    "voice assistants": {"p50_ms": 3.0, "p95_ms": 8.0},
}


def prompt_sets(folder: Path) -> dict[str, Callable[[], Prompts]]:
    """The sets in a folder by name, each read when it is called."""

    def path(name: str) -> tuple[Path, ...]:
        return (folder / f"{name}.jsonl",)

    scale = path("ni150/register") + path("scale/register")
    ni = Files(path("ni150/register"), path("ni150/test"), path("ni150/ood"), path("ni150/tasks"))
    zero = replace(ni, register=path("ni150/register_zero"), description="definition")
    every = replace(
        ni,
        register=path("ni150/register") + path("ni150/register_zero"),
        fields=("brief",),
        register_fields=("instance", "instruct", "definition"),
    )
    prompt = Files((), (), fields=("prompt",))
    spoken = Files(path("scale/register"), path("scale/test"), path("ni150/ood"))
    files = {
        **{f"ni150 {form}": replace(ni, fields=(form,)) for form in FORMS},
        "ni150 brief, all forms registered": every,
        "ni150 instance, 5 samples": replace(ni, samples=5),
        "ni150 instance, 1 sample": replace(ni, samples=1),
        "ni150 instance, no sample": zero,
        "552 experts, ni150 instance": replace(ni, register=scale),
        "flan48": replace(prompt, register=path("flan48/register"), test=path("flan48/test")),
        "paraphrase": replace(prompt, register=path("paraphrase/prompts"), test=path("paraphrase/prompts")),
    }
    voice = partial(_spoken, spoken)
    sets = {name: partial(_read, each, voice) for name, each in files.items()}
    return {**sets, "voice assistants": voice}


def _spoken(files: Files) -> Prompts:
    """The voice assistants' among the prompts."""
    prompts = read_prompts(files)
    samples = {task: texts for task, texts in prompts.samples.items() if task.startswith(SPOKEN)}
    return replace(prompts, samples=samples, test=tuple(each for each in prompts.test if each[0] in samples))


def _read(files: Files, voice: Callable[[], Prompts]) -> Prompts:
    """A set's prompts; those out of domain are spoken requests where it has none of its own."""
    prompts = read_prompts(files)
    return prompts if files.ood else replace(prompts, ood=voice().test)


def quickstart_set() -> Prompts:
    """The quickstart testbed: all its experts registered, those that are told by the instruction tested."""
    from eval.testbed.dataset import samples, tests
    from eval.testbed.ood import OOD
    from eval.testbed.tasks import TASKS

    told = [task for task in TASKS if not task.name.startswith("transform")]
    return Prompts(
        samples={
            task.name: tuple(row["prompt"] for row in samples(task, seed=0))
            for task in sorted(TASKS, key=lambda task: task.name)
        },
        test=tuple((task.name, row["prompt"]) for task in told for row in tests(task, seed=0)),
        ood=tuple(("", text) for text in OOD),
    )


def half_of(prompts: Prompts, half: Half) -> Prompts:
    """With the test prompts of every other task, and every other one out of domain; all stay registered."""
    step = {"all": slice(None), "tune": slice(0, None, 2), "report": slice(1, None, 2)}[half]
    mine = frozenset(sorted(prompts.samples)[step])
    return replace(prompts, test=tuple(each for each in prompts.test if each[0] in mine), ood=prompts.ood[step])


def heading() -> str:
    """Of a Markdown table of figures."""
    return f"| set | router | {' | '.join(SHOWN)} |\n|---|---|{'---:|' * len(SHOWN)}"


def figures(name: str, measured: Sequence[Result]) -> Iterator[str]:
    """Its rows, one to a router."""
    for result in measured:
        cells = [f"{result.metrics[key].value:.3f}" if key in result.metrics else "" for key in SHOWN]
        yield f"| {name} | {result.router.name} | {' | '.join(cells)} |"


def targets(results: Mapping[str, list[Result]]) -> Iterator[str]:
    """Lines of a Markdown table: a row to a target, a column to a router; what is reached is bold."""
    routers = [result.router.name for result in next(iter(results.values()), [])]
    yield f"| set | metric | target | {' | '.join(routers)} |\n|---|---|---:|{'---:|' * len(routers)}"
    for name, wanted in TARGETS.items():
        for metric, bound in wanted.items() if name in results else ():
            cells = []
            for found in (result.metrics[metric] for result in results[name]):
                text = f"{found.value:.3g} [{found.low:.3g}, {found.high:.3g}]"
                reached = found.value <= bound if metric.endswith("_ms") else found.value >= bound
                cells.append(f"**{text}**" if reached else text)
            yield f"| {name} | {metric} | {bound:g} | {' | '.join(cells)} |"


def main(
    folder: Annotated[Path, typer.Argument(help="A routebench folder.", exists=True, file_okay=False)],
    half: Annotated[Half, typer.Option(help="Of the test prompts.")] = "report",
    router: Annotated[list[str] | None, typer.Option(help="As in `moerge eval routing`; repeatable.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Sets whose name starts like this; repeatable.")] = None,
    prefix: Annotated[str, typer.Option(help="Encoder's instruction, before every text.")] = "",
    system: Annotated[str, typer.Option(help="System message, before every test prompt.")] = "",
    backend: Annotated[Backend, typer.Option(help="What runs the encoder.")] = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="All figures with intervals, and confusions.")
    ] = None,
) -> None:
    """Print two Markdown tables: the figures of every set and router, as they come, and the targets."""
    specs = [spec for given in router or ["retrieval"] for spec in specs_of(given)]
    encoder = Remembering(load_encoder(backend=backend, prefix=prefix), default_folder())
    results: dict[str, list[Result]] = {}
    typer.echo(heading())
    for name, read in {**prompt_sets(folder), QUICKSTART: quickstart_set}.items():
        if not name.startswith(tuple(only or [""])):
            continue
        prompts = half_of(read(), "all" if name == QUICKSTART else half)
        if system:
            test, ood = (
                tuple((task, system + JOINT + text) for task, text in each) for each in (prompts.test, prompts.ood)
            )
            prompts = replace(prompts, test=test, ood=ood)
        with progress_bar(name) as tell:
            encoder.prepare(prompts.texts(), lambda done, total: tell("encoding", done, total))
            results[name] = [measure(spec, prompts, encoder, tell=tell) for spec in specs]
        typer.echo("\n".join(figures(name, results[name])))
        if json_file:
            document = {key: [result.json() for result in measured] for key, measured in results.items()}
            json_file.write_text(json.dumps({"half": half, "encoder": encoder.id, "sets": document}, indent=1), "utf-8")
    typer.echo("\n".join(["", *targets(results)]))


if __name__ == "__main__":
    typer.run(main)
