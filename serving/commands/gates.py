"""`moerge gates`: what gates need beside an expert's weights. Trains in this process, on the registry's files."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import typer

from serving.commands.common import (
    DEFAULT_URL,
    ApiKey,
    AsJson,
    Url,
    answer,
    client,
    fail,
    out,
    print_json,
)
from serving.commands.offline import Config, DataDir, Device, ManifestFile, Workplace, progress_bar, workplace

if TYPE_CHECKING:
    from adapters_registry.expert import Expert
    from router.adapted import Example
    from router.gate_training import Schedule

app = typer.Typer(help="Train and calibrate what token-level gates need.", no_args_is_help=True)

TrainedGate = Literal["phatgoose", "meteora"]


@app.command()
def train(
    names: Annotated[list[str], typer.Argument(help="Experts, by name: their active versions.")],
    gate: Annotated[
        str, typer.Option(help="phatgoose: each expert by itself; meteora: these experts together.")
    ] = "phatgoose",
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 100,
    batch: Annotated[int, typer.Option(min=1, help="Samples in a step.")] = 8,
    rate: Annotated[float, typer.Option(min=0, help="Learning rate.")] = 5e-3,
    seed: Annotated[int, typer.Option(help="Of the order of samples.")] = 0,
    device: Device = "cpu",
    config: Config = None,
    manifest: ManifestFile = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
) -> None:
    """Train gate vectors of experts on their samples, weights frozen, and keep them with the experts' versions.

    A running server with the same registry uses them within a second.
    """
    if gate not in get_args(TrainedGate):
        fail(f"No trained gate '{gate}'. There are: {', '.join(get_args(TrainedGate))}.")
    if gate == "meteora" and len(set(names)) < 2:
        fail("MeteoRA's gate tells experts from each other: name at least two.")
    from router.gate_training import Schedule

    with workplace(config, manifest, data_dir) as place:
        experts = [place.registry.get(name) for name in dict.fromkeys(names)]
        trained = _train(place, experts, gate, Schedule(steps, batch, rate, seed), device)
    if as_json:
        print_json({"gate": gate, "experts": trained})
        return
    for each in trained:
        out.print(
            f"{each['name']} version {each['version']}: {each['modules']} vectors, "
            f"loss {each['first_loss']:.4f} -> {each['last_loss']:.4f}, {each['seconds']:.1f} s",
            highlight=False,
        )


@app.command()
def calibrate(
    names: Annotated[list[str] | None, typer.Argument(help="Experts, by name; all when none is named.")] = None,
    gate: Annotated[str, typer.Option(help="The gate that will use the statistics.")] = "evidence",
    settings: Annotated[str, typer.Option(help="The gate's settings that differ from its defaults, as JSON.")] = "{}",
    prompts: Annotated[
        Path | None, typer.Option(help="Neutral prompts, one on each line; the other experts' samples if not given.")
    ] = None,
    again: Annotated[bool, typer.Option(help="Also experts that were measured before.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Let the running server measure experts' scores on neutral prompts, which z-scores need.

    The server does this by itself when a gate first needs it, with the other experts' samples.
    """
    body: dict[str, Any] = {"gate": gate, "again": again}
    try:
        body["settings"] = json.loads(settings)
    except ValueError as error:
        fail(f"--settings is not JSON: {error}")
    if names:
        body["experts"] = names
    if prompts is not None:
        body["prompts"] = _lines(prompts)
    with client(url, api_key) as http:
        result = answer(http.post("/v1/gates/calibrate", json=body))
    if as_json:
        print_json(result)
        return
    measured = ", ".join(result["measured"]) or "nobody; all had been measured before (--again measures once more)"
    out.print(f"{result['key']}: measured {measured}", highlight=False)


def _lines(file: Path) -> list[str]:
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{file}: {error}")
    if not lines:
        fail(f"{file} holds no prompts; it needs one on each line.")
    return lines


def _train(
    place: Workplace, experts: Sequence[Expert], gate: str, schedule: Schedule, device: str
) -> list[dict[str, Any]]:
    """Trains, keeps, and tells of each expert what was done."""
    from router.adapted import encode
    from router.gate_training import train_meteora, train_phatgoose

    tokenizer = place.tokenizer()
    samples: dict[str, list[Example]] = {
        expert.name: [encode(tokenizer, each.prompt, each.answer) for each in expert.samples if each.answer is not None]
        for expert in experts
    }
    if missing := [name for name, examples in samples.items() if not examples]:
        fail(f"Without samples that have answers there is nothing to train on: {', '.join(missing)}.")
    model = place.model(device)
    report = []
    folders = {expert.name: expert.path for expert in experts}
    with progress_bar() as progress:
        rounds = [[expert] for expert in experts] if gate == "phatgoose" else [list(experts)]
        for members in rounds:
            losses: list[float] = []
            bar = progress.add_task(", ".join(each.name for each in members), total=schedule.steps)

            def tell(step: int, loss: float, bar: Any = bar, losses: list[float] = losses) -> None:
                losses.append(loss)
                progress.update(bar, completed=step)

            started = time.monotonic()
            if gate == "phatgoose":
                name = members[0].name
                vectors = {name: train_phatgoose(model, folders[name], samples[name], schedule, tell)}
            else:
                vectors = train_meteora(model, folders, samples, schedule, tell)
            seconds = time.monotonic() - started
            for expert in members:
                mine = {module: vector.cpu().numpy() for module, vector in vectors[expert.name].items()}
                place.registry.set_tensors(expert.name, expert.version, gate, mine)
                report.append(
                    {
                        "name": expert.name,
                        "version": expert.version,
                        "modules": len(mine),
                        "samples": len(samples[expert.name]),
                        "first_loss": losses[0],
                        "last_loss": losses[-1],
                        "seconds": seconds,
                    }
                )
    return report
