"""`moerge router list|show|promote|rollback|train`: what the router has learned, and learning from feedback.

Works on the registry's files; a running server with the same registry follows within a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from router.errors import RouterError
from serving.commands.common import AsJson, err, fail, out, print_json
from serving.commands.offline import Config, DataDir, ManifestFile, Workplace, progress_bar, workplace

if TYPE_CHECKING:
    from router.learning import Report
    from router.router import Router
    from router.versions import Active, Content, Learned, RouterVersions

Number = Annotated[int, typer.Argument(min=0, help="A version's number; 0 is the registry alone.")]


def versions_of(place: Workplace) -> RouterVersions:
    from router.versions import RouterVersions

    return RouterVersions(place.registry.store.root.with_name("routers"))


def router_of(place: Workplace, learned: Learned) -> Router:
    """The router that a server would have."""
    from router.encoder import load_encoder
    from router.router import Router

    wanted = place.plan.settings.router
    encoder = load_encoder(wanted.encoder, backend=wanted.encoder_backend, threads=wanted.encoder_threads)
    router = Router(encoder, wanted, max_rank=place.plan.settings.engine.max_rank)
    known = place.registry.prototypes(router.encoder_id)
    router.refresh(place.registry.experts(), place.registry.generation(), prototypes=known, learned=learned)
    return router


@contextmanager
def versions(config: Path | None, manifest: Path | None, data_dir: Path | None) -> Iterator[RouterVersions]:
    """The versions of the router that `moerge serve` uses with the same options; its errors end the command."""
    with workplace(config, manifest, data_dir) as place:
        try:
            yield versions_of(place)
        except RouterError as error:
            fail(str(error))


def list_versions(
    config: Config = None, manifest: ManifestFile = None, data_dir: DataDir = None, as_json: AsJson = False
) -> None:
    """List what the router has learned, version by version, and which one is in force."""
    with versions(config, manifest, data_dir) as known:
        active = known.active()
        rows = [_row(known, number, active) for number in known.numbers()]
    if as_json:
        print_json({"active": active.learned.number, "problems": active.problems, "versions": rows})
        return
    table = Table("version", "made", "from", "good", "bad", "calibrated", "note")
    for row in rows:
        mark = " (in force)" if row["active"] else ""
        if "problem" in row:
            table.add_row(f"{row['number']}{mark}", "", "", "", "", "", row["problem"])
        else:
            cells = (row["created_at"][:16].replace("T", " "), row["parent"], row["good"], row["bad"])
            table.add_row(f"{row['number']}{mark}", *map(str, cells), ", ".join(row["calibrated"]), row["note"])
    out.print(table)
    if not active.learned.number:
        out.print("Nothing learned is in force: the registry alone is used.")
    _warn(active)


def show(
    number: Annotated[
        int | None, typer.Argument(min=0, help="A version's number; the one in force if left out.")
    ] = None,
    config: Config = None,
    manifest: ManifestFile = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Show one version: what it knows, and how it compared with the one before."""
    with versions(config, manifest, data_dir) as known:
        active = known.active()
        learned = active.learned if number is None else known.load(number)
    content = learned.content
    if as_json:
        print_json(content.model_dump(mode="json"))
        return
    summary = _summary(content)
    in_force = "in force" if learned.number == active.learned.number else "not in force"
    out.print(
        f"Version {learned.number}, {in_force}, from version {content.parent}. {content.note}".rstrip(), markup=False
    )
    out.print(f"{summary['good']} good and {summary['bad']} bad answers to learn from.", highlight=False)
    if content.calibration:
        out.print(f"Calibrated: {', '.join(sorted(content.calibration))}.", highlight=False)
    if "training" in content.report:
        from router.learning import Report

        out.print(_table(Report.model_validate(content.report["training"])))
    _warn(active)


def promote(
    number: Number,
    config: Config = None,
    manifest: ManifestFile = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Put a version in force."""
    with versions(config, manifest, data_dir) as known:
        _in_force(known.promote(number), as_json)


def rollback(
    config: Config = None, manifest: ManifestFile = None, data_dir: DataDir = None, as_json: AsJson = False
) -> None:
    """Return to the version that was in force before this one."""
    with versions(config, manifest, data_dir) as known:
        _in_force(known.rollback(), as_json)


def train(
    method: Annotated[str | None, typer.Option(help="Which served method to judge by; the default one.")] = None,
    config: Config = None,
    manifest: ManifestFile = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Learn from feedback, compare the new router with the old one, and put it in force if it routes better.

    Both are asked about held-out samples and held-out feedback. A version that is no better is kept aside.
    """
    with workplace(config, manifest, data_dir) as place:
        known = versions_of(place)
        active = known.active()
        _warn(active)
        try:
            router = router_of(place, active.learned)
            version, report = _train(place, known, router, method or router.settings.method)
            router.close()
        except RouterError as error:
            fail(str(error))
    if as_json:
        told = report.model_dump() if report else None
        print_json({"version": version, "promoted": bool(report and report.better), "report": told})
    elif report is None:
        out.print("There is no feedback that the version in force does not know already.", soft_wrap=True)
    else:
        out.print(_table(report))
        out.print(f"Learned from {report.good} good and {report.bad} bad answers.", highlight=False)
        verdict = "is in force" if report.better else f"is kept aside: {report.why}"
        out.print(f"Router version {version} {verdict}.", highlight=False, soft_wrap=True)


def _train(place: Workplace, known: RouterVersions, router: Router, name: str) -> tuple[int | None, Report | None]:
    """The number of the new version, in force if it is better, and the comparison; nothing if nothing is new."""
    from router import learning
    from router.errors import UnknownMethod
    from router.methods import METHODS

    if name not in router.methods:
        raise UnknownMethod(name, known=router.methods)
    library = router.library
    assert library is not None
    old, encoder, embed = library.learned, router.encoder_id, router.embed
    there = {expert.name for expert in library.experts}
    judged = learning.judged(place.registry.decisions.rated(), encoder, embed)
    new = learning.fresh(old, [each for each in judged if each.rating.expert in there])
    if not new:
        return None, None
    settings = METHODS[name].Settings.model_validate(router.settings.methods[name])
    trial = learning.Trial(name, METHODS[name], settings, library, encoder, embed)
    with progress_bar() as progress:
        bar = progress.add_task("old against new", total=learning.FOLDS)
        report = learning.compare(trial, new, lambda done, of: progress.update(bar, completed=done, total=of))
    learned = learning.taught(old, new, encoder, embed)
    version = known.save(
        note=f"learned from {len(new)} judgements",
        ratings=learned.content.ratings,
        vectors=learned.vectors,
        encoder=encoder,
        calibration=old.calibration,
        report={"training": report.model_dump()},
    )
    if report.better:
        known.promote(version.number)
    return version.number, report


def _summary(content: Content) -> dict[str, Any]:
    from router.versions import NEUTRAL

    return {
        "number": content.number,
        "created_at": content.created_at.isoformat(),
        "parent": content.parent,
        "note": content.note,
        "good": sum(rating.score > NEUTRAL for rating in content.ratings),
        "bad": sum(rating.score < NEUTRAL for rating in content.ratings),
        "calibrated": sorted(content.calibration),
    }


def _row(known: RouterVersions, number: int, active: Active) -> dict[str, Any]:
    here = {"active": number == active.learned.number}
    try:
        return {**_summary(known.load(number).content), **here}
    except RouterError as error:
        return {"number": number, "problem": str(error), **here}


def _in_force(learned: Learned, as_json: bool) -> None:
    if as_json:
        print_json({"active": learned.number})
    else:
        what = f"Version {learned.number}" if learned.number else "The registry alone (version 0)"
        out.print(f"{what} is in force.", highlight=False)


def _warn(active: Active) -> None:
    for problem in active.problems:
        err.print(problem, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _table(report: Report) -> Table:
    table = Table("held-out", "prompts", "old", "new", "difference (95 %)", caption=f"auto:{report.method}")
    for name, each in (("samples", report.samples), ("feedback", report.feedback)):
        interval = f"{each.difference:+.3f} ({each.low:+.3f} to {each.high:+.3f})"
        table.add_row(name, str(each.prompts), f"{each.old:.3f}", f"{each.new:.3f}", interval)
    return table
