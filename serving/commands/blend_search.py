"""`moerge blend search`: weights from a small labelled set, in this process; the result is a stored blend."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serving.commands.blends import read_setting
from serving.commands.common import AsJson, fail, out, print_json
from serving.commands.offline import Config, DataDir, Device, ManifestFile, Workplace, progress_bar, workplace

if TYPE_CHECKING:
    from serving.labelled import Judgement
    from serving.searching import How, Mixture


def search(
    name: Annotated[str, typer.Argument(help="Name to store the blend under.")],
    experts: Annotated[str, typer.Option(help="Its members, by name, with commas between them.")],
    labelled: Annotated[Path, typer.Option(help="JSONL of {prompt, answer}; a few dozen rows are enough.")],
    method: Annotated[str, typer.Option(help="soup: the mean of those that help; lorahub: any weights.")] = "soup",
    metric: Annotated[
        str, typer.Option(help="likelihood: of the answers; exact: the share of answers that are exactly right.")
    ] = "likelihood",
    operator: Annotated[str, typer.Option(help="How the members are merged.")] = "cat",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of the operator's settings; may be repeated.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Evaluations by lorahub.")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="Of lorahub's steps.")] = 0,
    description: Annotated[str, typer.Option(help="What it is good at.")] = "",
    replace: Annotated[bool, typer.Option("--replace", help="In place of the blend that has this name.")] = False,
    device: Device = "cpu",
    config: Config = None,
    manifest: ManifestFile = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Find a blend's weights on a few labelled rows, and store it under a name with how it was found.

    A running server with the same registry serves it within a second.
    """
    from router.blending import SEARCHES, BlendError

    options = dict(read_setting(each) for each in settings or ())
    names = [each.strip() for each in experts.split(",") if each.strip()]
    if len(names) < 2 or len(set(names)) < len(names):
        fail(f"A search needs at least two experts, each once; --experts has {', '.join(names) or 'none'}.")
    if method not in SEARCHES:
        fail(f"No search '{method}'. There are: {', '.join(SEARCHES)}.")
    from serving.searching import COSTS, How, Mixture

    if metric not in COSTS:
        fail(f"No metric '{metric}'. There are: {', '.join(COSTS)}.")
    about = {"description": description}
    with workplace(config, manifest, data_dir) as place:
        try:
            mixture = Mixture.of(place.registry, names, operator, options, place.plan.settings.engine.max_rank)
            found = _search(place, mixture, How(method, metric, steps, seed), labelled, device, name, about, replace)
        except (BlendError, OSError, ValueError) as error:  # bad rows are a ValueError
            fail(str(error))
    if as_json:
        print_json(found)
        return
    weights = " + ".join(f"{weight:.3g} {expert}" for expert, weight in found["weights"].items())
    out.print(f"{found['name']} ({found['id']}) = {weights}, by {operator}", highlight=False)
    for who, judged in found["judged"].items():
        out.print(f"{who:>10}: loss {judged['loss']:.4f}, exact {judged['exact']:.3f}", highlight=False)


def _search(
    place: Workplace,
    mixture: Mixture,
    how: How,
    labelled: Path,
    device: str,
    name: str,
    about: dict[str, Any],
    replace: bool,
) -> dict[str, Any]:
    """Searches and stores; what would keep the blend from being stored is told before."""
    from adapters_registry.errors import BlendRefused
    from router.adapted import encode
    from serving.labelled import Judge, read_labelled

    K, began = len(mixture.parts), time.monotonic()
    uniform = [1 / K] * K
    rows = read_labelled(labelled)
    if reasons := place.registry.blends.against(mixture.stored(name, uniform), replace=replace):
        raise BlendRefused(name, reasons)
    tokenizer = place.tokenizer()
    examples = [encode(tokenizer, row.prompt, row.answer or "") for row in rows]
    judged: dict[tuple[float, ...], Judgement] = {}
    with tempfile.TemporaryDirectory(prefix="moerge-search-") as temporary, progress_bar() as progress:
        folder = Path(temporary) / "blend"
        judge = Judge(place.model(device), examples, mixture.build, folder)
        bar = progress.add_task(how.method, total=how.evaluations(K) + 2)

        def ask(weights: Sequence[float]) -> Judgement:
            if tuple(weights) not in judged:
                judged[tuple(weights)] = judge(weights)
                progress.update(bar, completed=len(judged))
            return judged[tuple(weights)]

        found = how.find(K, ask)
        if not any(found.weights):
            fail("Nothing that was tried is better than the base model alone, so nothing is stored.")
        table = {"found": ask(found.weights), "uniform": ask(uniform), "base": ask([0.0] * K)}
        report = asdict(mixture.build(found.weights, folder))
    search = {
        **how.told(),
        "rows": len(rows),
        "rows_sha256": hashlib.sha256(labelled.read_bytes()).hexdigest(),
        "evaluations": len(found.history),
        "judged": {who: each._asdict() for who, each in table.items()},
    }
    blend = place.registry.blends.create(
        mixture.stored(name, found.weights, report=report, search=search, **about), replace=replace
    )
    weights = {each.expert: each.weight for each in blend.members}
    return {"name": blend.name, "id": blend.id, "weights": weights, "seconds": time.monotonic() - began, **search}
