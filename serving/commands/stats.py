"""`moerge expert stats`: what the operators `regmean` and `fisher` need of an expert, in this process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serving.commands.common import AsJson, err, fail, out, print_json
from serving.commands.offline import Config, DataDir, Device, ManifestFile, Workplace, progress_bar, workplace

if TYPE_CHECKING:
    from adapters_registry.expert import Expert
    from router.blending.operator import Statistic


def stats(
    names: Annotated[list[str] | None, typer.Argument(help="Experts, by name: their active versions.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All active experts.")] = False,
    kind: Annotated[str, typer.Option(help="gram: for regmean; fisher: for fisher; both.")] = "both",
    force: Annotated[bool, typer.Option("--force", help="Also what is up to date.")] = False,
    device: Device = "cpu",
    config: Config = None,
    manifest: ManifestFile = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Measure experts' statistics on their samples, and keep them with the experts' versions.

    A running server with the same registry uses them within a second. Leaves with 1 when somebody had to be left out.
    """
    if bool(names) == every:
        fail("Name experts, or say --all; not both." if names else "Which experts? Name them, or say --all.")
    from serving.statistics import KINDS

    if kind not in ("both", *KINDS):
        fail(f"No statistics '{kind}'. There are: {', '.join(KINDS)}, both.")
    kinds = [each for each in KINDS if kind in (each, "both")]
    with workplace(config, manifest, data_dir) as place:
        chosen = [place.registry.get(name) for name in dict.fromkeys(names or ())]
        report = _measure(place, chosen or place.registry.experts(), kinds, force, device)
    if as_json:
        print_json(report)
    else:
        _tell(report)
    if report["left_out"]:
        raise typer.Exit(1)


def _measure(
    place: Workplace, experts: Sequence[Expert], kinds: Sequence[Statistic], force: bool, device: str
) -> dict[str, list[dict[str, Any]]]:
    """Measures and keeps, one after the other; what was done before an interruption stays."""
    from router.blending.measuring import measure
    from serving.statistics import is_measured, reason_against

    report: dict[str, list[dict[str, Any]]] = {"measured": [], "up_to_date": [], "left_out": []}
    work: list[tuple[Expert, Statistic]] = []
    for expert in experts:
        for kind in kinds:
            row = about(expert, kind)
            if why := reason_against(expert, kind):
                report["left_out"].append({**row, "why": why})
            elif not force and is_measured(place.registry, expert, kind):
                report["up_to_date"].append(row)
            else:
                work.append((expert, kind))
    if not work:
        return report
    model, tokenizer = place.model(device), place.tokenizer()
    with progress_bar() as progress:
        for expert, kind in work:
            row, began = about(expert, kind), time.monotonic()
            bar = progress.add_task(f"{expert.name} {kind}", total=len(expert.samples))

            def tell(done: int, bar: Any = bar) -> None:
                progress.update(bar, completed=done)

            try:
                measured = measure(model, tokenizer, expert.path, expert.samples, kind, tell)
                found = {module: tensor.cpu().numpy() for module, tensor in measured.items()}
                place.registry.set_tensors(expert.name, expert.version, kind, found)
            except ValueError as error:
                report["left_out"].append({**row, "why": str(error)})
                continue
            size = sum(matrix.nbytes for matrix in found.values())
            seconds = time.monotonic() - began
            report["measured"].append({**row, "modules": len(found), "bytes": size, "seconds": seconds})
    return report


def about(expert: Expert, kind: Statistic) -> dict[str, Any]:
    return {"name": expert.name, "version": expert.version, "kind": kind}


def _tell(report: dict[str, list[dict[str, Any]]]) -> None:
    for each in report["measured"]:
        out.print(
            f"{each['name']} version {each['version']}: {each['kind']} of {each['modules']} modules, "
            f"{each['bytes'] / 2**20:.1f} MiB, {each['seconds']:.1f} s",
            highlight=False,
        )
    if count := len(report["up_to_date"]):
        out.print(f"{count} up to date (--force measures them again).", highlight=False)
    for each in report["left_out"]:
        err.print(f"{each['name']}: no {each['kind']} statistics: {each['why']}.", style="yellow", markup=False)
