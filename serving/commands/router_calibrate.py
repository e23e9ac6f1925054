"""`moerge router calibrate`: confidence that is the probability of being right, and thresholds for a wanted rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from serving.commands.common import AsJson, fail, out, print_json
from serving.commands.experts import read_samples
from serving.commands.offline import Config, DataDir, ManifestFile, progress_bar, workplace
from serving.commands.router_versions import router_of, versions_of

if TYPE_CHECKING:
    from router.calibrating import Report
    from router.calibration import Calibration
    from router.router import Router
    from router.versions import Learned, RouterVersions

#: With fewer experts than this, neutral prompts stand in for prompts out of domain as well.
FEW = 10


def calibrate(
    far: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Wanted share of prompts out of domain that an expert answers.")
    ] = 0.05,
    method: Annotated[
        list[str] | None, typer.Option(help="Methods that are served; the default one when not given. May be repeated.")
    ] = None,
    ood: Annotated[
        Path | None, typer.Option(help="Prompts that no expert is for, as JSONL or a line each; else stand-ins.")
    ] = None,
    share: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Share of all prompts that is expected to be out of domain.")
    ] = 0.1,
    stage: Annotated[bool, typer.Option(help="Keep the new version aside until it is promoted.")] = False,
    config: Config = None,
    manifest: ManifestFile = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Measure the router on samples that it was not fitted to, and make its confidence and thresholds true to that.

    A running server with the same registry uses them within a second. Without --ood, the samples of experts that are
    taken away with everything like them stand in for prompts that no expert is for.
    """
    prompts = _prompts(ood) if ood else []
    with workplace(config, manifest, data_dir) as place:
        wanted = place.plan.settings.router
        names = list(dict.fromkeys(method or [wanted.method]))
        if unknown := [name for name in names if name not in wanted.methods]:
            fail(f"Not served: {', '.join(unknown)}. Served are {', '.join(wanted.methods)}.")
        versions = versions_of(place)
        before = versions.active().learned
        router = router_of(place, before)
        found = {name: _calibrate(router, name, prompts, far, share) for name in names}
        router.close()
        reports = {name: asdict(report) for name, (_, report) in found.items()}
        kept = {name: calibration.model_dump(mode="json") for name, (calibration, _) in found.items()}
        version = _keep(versions, before, kept, far, reports)
        if not stage:
            versions.promote(version.number)
    if as_json:
        print_json({"version": version.number, "promoted": not stage, "far": far, "methods": reports})
        return
    out.print(_table(reports))
    out.print(f"Router version {version.number} is {'kept aside' if stage else 'in force'}.", highlight=False)


def _prompts(file: Path) -> list[str]:
    prompts = [each if isinstance(each, str) else each.get("prompt", "") for each in read_samples(file)]
    if bad := [number for number, each in enumerate(prompts, start=1) if not isinstance(each, str) or not each.strip()]:
        fail(f"{file}: prompt {bad[0]} has no text; prompts are lines, JSON strings, or objects with `prompt`.")
    if not prompts:
        fail(f"{file} holds no prompts; it needs one on each line.")
    return prompts


def _calibrate(
    router: Router, name: str, prompts: Sequence[str], far: float, share: float
) -> tuple[Calibration, Report]:
    from router.calibrating import calibrate as measure
    from router.held_out import hold_out
    from router.method import fitted
    from router.methods import METHODS
    from serving.neutral import NEUTRAL

    library, settings = router.library, METHODS[name].Settings.model_validate(router.settings.methods[name])
    assert library is not None
    asked = prompts or (NEUTRAL if len(library) < FEW else ())
    outside = list(zip(asked, router.embed(asked), strict=True)) if asked else []
    with progress_bar() as progress:
        bar = progress.add_task(name, total=None)
        held = hold_out(
            METHODS[name],
            settings,
            library,
            outside=outside,
            regions=not prompts,
            tell=lambda done, of: progress.update(bar, completed=done, total=of),
        )
    plain = fitted(METHODS[name], library, settings)
    try:
        return measure(held, plain, settings, far=far, share=share, encoder=router.encoder_id)
    except ValueError as error:
        fail(f"{name}: {error}")


def _keep(
    versions: RouterVersions,
    before: Learned,
    calibration: dict[str, dict[str, Any]],
    far: float,
    reports: dict[str, dict[str, Any]],
) -> Learned:
    """The next version: all that the one in force knows, and this."""
    known = before.content
    return versions.save(
        note=f"calibrated {', '.join(calibration)} for a false-accept rate of {far:g}",
        ratings=known.ratings,
        vectors=before.vectors,
        encoder=known.encoder,
        calibration={**known.calibration, **calibration},
        report={"calibration": reports},
    )


def _table(reports: dict[str, dict[str, Any]]) -> Table:
    """Shares before and after."""
    table = Table()
    for title in ("method", "prompts", "out of domain", "right", "calibration error", "false accepts", "lost"):
        table.add_column(title, justify="left" if title == "method" else "right")
    for name, each in reports.items():
        pairs = [f"{each[f'{key}_before']:.3f} -> {each[f'{key}_after']:.3f}" for key in ("ece", "far", "lost")]
        table.add_row(name, str(each["prompts"]), str(each["outside"]), f"{each['right']:.3f}", *pairs)
    return table
