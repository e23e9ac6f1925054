"""How well token-level gates answer the testbed's prompts, beside the base model, the oracle and retrieval.

    python -m eval.gates [--prompts 12] [--seed 0] [--others] [--only arrow] [--cache FOLDER] [--json FILE]

Prints a Markdown table: exact match over the composite of all experts, over the composite of the four that retrieval
shortlists, and on the compositions; for methods that decide on one expert also how often it is the prompt's own.
All in process, with `eval.twin`; --json writes the same, per kind of expert.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor

from eval.arena import Arena, Set, load
from eval.calibration import calibrate
from eval.testbed.manifest import read_jsonl
from router.adapted import encode
from router.gate_training import Schedule, train_meteora, train_phatgoose
from router.methods.gated import ProbeSettings

SHORTLIST = 4
TEMPERATURE = 0.2  # of the softmax over retrieval's scores that makes a prior


@dataclass(frozen=True)
class Row:
    """One way to answer. `gate` weighs tokens; `decides` gives one-hot weights for a request instead."""

    name: str
    gate: str = "constant"
    settings: Mapping[str, Any] = field(default_factory=dict)
    prior: bool = False
    decides: Callable[[Arena, Sequence[Set], Row], Tensor] | None = None
    shortlisted: bool = True  # whether it is something else on a shortlist


@dataclass(frozen=True)
class Result:
    """Shares: exact match on the prompts made for one expert, by kind and on compositions; routing accuracy.

    None where there is no such prompt, and for the last where no single expert is decided on.
    """

    name: str
    members: str
    exact: float | None
    instruction: float | None
    input: float | None
    composition: float | None
    routed: float | None


def nobody(arena: Arena, sets: Sequence[Set], row: Row) -> Tensor:
    return torch.zeros(len(arena.prompts), len(arena.names))


def oracle(arena: Arena, sets: Sequence[Set], row: Row) -> Tensor:
    """The prompt's own expert; for a composition both halves of one half each."""
    return torch.tensor([[(n in p.owners) / len(p.owners) for n in arena.names] for p in arena.prompts])


def retrieved(arena: Arena, sets: Sequence[Set], row: Row) -> Tensor:
    return one_hot(torch.from_numpy(arena.similarity))


def mixed(arena: Arena, sets: Sequence[Set], row: Row) -> Tensor:
    return arena.prior(TEMPERATURE)


def probed(arena: Arena, sets: Sequence[Set], row: Row) -> Tensor:
    """The expert with the most evidence, by `beta` a unit, beside its prior if there is one."""
    settings = dict(row.settings)
    beta, last = settings.pop("beta", ProbeSettings.model_fields["beta"].default), settings.pop("last", False)
    E = beta * arena.evidence(settings, sets, decay=0.0 if last else 1.0)
    return one_hot(E + arena.prior(TEMPERATURE).log() if row.prior else E)


def one_hot(scores: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(scores.argmax(1), scores.shape[1]).float()


ROWS: tuple[Row, ...] = (
    Row("base model", decides=nobody, shortlisted=False),
    Row("oracle", decides=oracle, shortlisted=False),
    Row("retrieval: select", decides=retrieved, shortlisted=False),
    Row("retrieval: mixture", decides=mixed),
    Row("uniform"),
    Row("arrow", "arrow", {"top_k": 3}),
    Row("arrow, all members", "arrow"),
    Row("spectr", "spectr"),
    Row("spectr, unit", "spectr", {"normalise": "unit"}),
    Row("spectr, z-scored", "spectr", {"normalise": "zscore"}),
    Row("lag", "lag"),
    Row("smile", "smile"),
    Row("hilora", "hilora"),
    Row("phatgoose", "phatgoose"),
    Row("meteora", "meteora"),
    Row("evidence", "evidence"),
    Row("evidence, prior", "evidence", prior=True),
    Row("evidence, beta .3", "evidence", {"beta": 0.3}),
    Row("evidence, beta .3, prior", "evidence", {"beta": 0.3}, prior=True),
    Row("evidence, beta .003, prior", "evidence", {"beta": 0.003}, prior=True),
    Row("probe", settings={}, decides=probed),
    Row("probe, prior", decides=probed, prior=True),
    Row("probe, beta .03, prior", settings={"beta": 0.03}, decides=probed, prior=True),
    Row("probe, beta .3, prior", settings={"beta": 0.3}, decides=probed, prior=True),
    Row("probe, last token", settings={"last": True}, decides=probed),
    Row("probe, last token, beta .03, prior", settings={"last": True, "beta": 0.03}, decides=probed, prior=True),
)


def measure(arena: Arena, row: Row, members: str) -> Result:
    everyone = members == "all"
    sets = [arena.names] * len(arena.prompts) if everyone else arena.shortlists(SHORTLIST)
    routed = None
    given = arena.prior(TEMPERATURE) if row.prior else None
    if row.decides is not None:
        given = row.decides(arena, sets, row)
        single = torch.tensor([len(prompt.owners) == 1 for prompt in arena.prompts])
        if bool((given.amax(1) == 1)[single].all()):  # it decides on one expert
            routed = float((given.argmax(1) == arena.owned())[single].float().mean())
    right = arena.right(arena.answers(row.gate, row.settings if row.decides is None else {}, sets, given))

    def share(*told: str) -> float | None:
        mine = torch.tensor([prompt.told in told for prompt in arena.prompts])
        return float(right[mine].mean()) if bool(mine.any()) else None

    return Result(
        row.name,
        members,
        share("instruction", "input"),
        share("instruction"),
        share("input"),
        share("composition"),
        routed,
    )


def prepare(arena: Arena, rows: Sequence[Row], cache: Path | None) -> None:
    """What the rows' gates need beside weights: statistics on the other experts' samples, trained vectors."""
    uses = {(row.settings.get("normalise"), row.gate, row.decides is probed) for row in rows}
    if any(normalise == "zscore" or gate == "evidence" or probe for normalise, gate, probe in uses):
        owners, texts = zip(*arena.samples, strict=True)
        for name, kept in calibrate(
            arena.model, arena.folders, [arena.ids(text) for text in texts], list(owners), score="spectr"
        ).items():
            arena.kept[name].update(kept)
    for gate in {gate for _, gate, _ in uses} & {"phatgoose", "meteora"}:
        file = cache / f"{gate}.pt" if cache else None
        if file is not None and file.exists():
            trained = torch.load(file, weights_only=True)
        else:
            trained = train(arena, gate)
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.save(trained, file)
        for name, vectors in trained.items():
            arena.kept[name][gate] = vectors


def train(arena: Arena, gate: str) -> dict[str, dict[str, Tensor]]:
    """As `moerge gates train` does."""
    examples = {
        name: [
            encode(arena.tokenizer, row["prompt"], row["answer"])
            for row in read_jsonl(arena.data / "samples" / f"{name}.jsonl")
        ]
        for name in arena.names
    }
    if gate == "meteora":
        return train_meteora(arena.model, arena.folders, examples, Schedule(), lambda step, loss: None)
    return {
        name: train_phatgoose(arena.model, arena.folders[name], examples[name], Schedule(), lambda step, loss: None)
        for name in track(arena.names, gate, console=Console(stderr=True))
    }


def results(arena: Arena, rows: Sequence[Row]) -> Iterator[Result]:
    for row in rows:
        for members in ("all", "shortlist") if row.shortlisted else ("all",):
            yield measure(arena, row, members)


def main(
    prompts: Annotated[int, typer.Option(min=1, max=60, help="Test prompts of each expert.")] = 12,
    seed: Annotated[int, typer.Option(help="Which of them.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help="Rows whose name starts like this; repeatable.")] = None,
    others: Annotated[bool, typer.Option("--others", help="All the other test prompts instead.")] = False,
    compositions: Annotated[bool, typer.Option(help="Measure compositions too.")] = True,
    cache: Annotated[Path | None, typer.Option(help="Keep trained gate vectors here.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here as well.")] = None,
) -> None:
    torch.set_num_threads(1)
    arena = load(prompts, seed, compositions=compositions, others=others)
    rows = [row for row in ROWS if not only or row.name.startswith(tuple(only))]
    prepare(arena, rows, cache)
    typer.echo("| | members | exact match | instruction-told | input-told | compositions | routed right |")
    typer.echo("|---|---|---:|---:|---:|---:|---:|")
    found = []
    for each in results(arena, rows):
        found.append(each)
        figures = (each.exact, each.instruction, each.input, each.composition, each.routed)
        cells = ["" if value is None else f"{value:.3f}" for value in figures]
        typer.echo(f"| {each.name} | {each.members} | {' | '.join(cells)} |")
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
