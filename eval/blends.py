"""How well blends answer the testbed's prompts, by operator and members.

    python -m eval.blends [--prompts 12] [--seed 0] [--only ties] [--cache FOLDER] [--json FILE]

Prints a Markdown table: exact match, with its 95 % bootstrap interval over tasks, of blends of a prompt's own expert
and others, and of the two experts of a composition. All in process, on Transformers, one thread.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress

from eval.arena import Arena, Prompt, Set, load
from eval.blended import Blended, Recipe
from eval.intervals import Groups, estimate
from router.blending import OPERATORS
from router.mixture import MixtureSettings, mixture_weights

#: LoRAuter's temperature, on a grid on which prompts share blends.
WEIGHTS, SPREAD = MixtureSettings(top_k=4, grid=0.1), 0.2
COMPOSED, WEIGHED = "compositions", "4 nearest, retrieval's weights"


@dataclass(frozen=True)
class Row:
    """One way to answer.

    fixed   members and weights whatever the column says; None: the base model
    sums    every member has weight 1 instead of all together
    search  finds the weights; the column's are not used
    """

    name: str
    operator: str = "cat"
    settings: Mapping[str, Any] = field(default_factory=dict)
    sums: bool = False
    search: str | None = None
    fixed: Callable[[Arena, Prompt], Recipe] | None = None


@dataclass(frozen=True)
class Share:
    """Exact match over so many prompts, and its interval."""

    exact: float
    low: float
    high: float
    prompts: int


def nobody(arena: Arena, prompt: Prompt) -> Recipe:
    return Recipe(arena.names[:1], (0.0,))


def alone(arena: Arena, prompt: Prompt) -> Recipe:
    """The prompt's own expert; of a composition the first."""
    return Recipe(prompt.owners[:1], (1.0,))


def everyone(arena: Arena, prompt: Prompt) -> Recipe:
    return equal(arena.names)


def equal(members: Set) -> Recipe:
    return Recipe(members, (1 / len(members),) * len(members))


ROWS: tuple[Row, ...] = (
    Row("base model", fixed=nobody),
    Row("oracle", fixed=alone),
    Row("uniform of all", fixed=everyone),
    Row("`linear` of all", "linear", fixed=everyone),
    Row("`cat`"),
    Row("`cat`, weights of 1", sums=True),
    Row("`linear`", "linear"),
    Row("`svd`", "svd"),
    Row("`task_arithmetic`, weights of 1, scale .3", "task_arithmetic", {"scale": 0.3}, sums=True),
    Row("`smear`", "smear"),
    Row("`layer_swap`", "layer_swap"),
    Row("`ties`", "ties"),
    Row("`ties`, density .5", "ties", {"density": 0.5}),
    Row("`dare_linear`", "dare_linear"),
    Row("`dare_ties`", "dare_ties"),
    Row("`magnitude_prune`", "magnitude_prune"),
    Row("`della`", "della"),
    Row("`breadcrumbs`", "breadcrumbs"),
    Row("`sce`", "sce"),
    Row("`pcb`", "pcb"),
    Row("`consensus`", "consensus"),
    Row("`knots`", "knots"),
    Row("`lego`", "lego"),
    Row("`fisher`", "fisher"),
    Row("`regmean`", "regmean"),
    Row("`soup`, 20 labelled", search="soup"),
    Row("`lorahub`, 20 labelled", search="lorahub"),
)

Columns = dict[str, dict[int, Recipe]]  # by prompt


def columns(arena: Arena) -> Columns:
    """Members and weights for every prompt that a column is about."""
    single = [n for n, prompt in enumerate(arena.prompts) if len(prompt.owners) == 1]
    composed = [n for n, prompt in enumerate(arena.prompts) if len(prompt.owners) > 1]

    def of(choose: Callable[[str], Set]) -> dict[int, Recipe]:
        return {n: equal(choose(arena.prompts[n].owners[0])) for n in single}

    found = {
        "2 nearest": of(lambda name: nearest(arena, name, 2)),
        "4 nearest": of(lambda name: nearest(arena, name, 4)),
        WEIGHED: {n: retrieved(arena, n, nearest(arena, arena.prompts[n].owners[0], 4)) for n in single},
        "4 at random": of(lambda name: at_random(arena, name, 4)),
        COMPOSED: {n: equal(arena.prompts[n].owners) for n in composed},
    }
    return {name: column for name, column in found.items() if column}


def nearest(arena: Arena, name: str, size: int) -> Set:
    """An expert and those whose prototypes retrieval finds most alike to its samples: a hard set; in `names`' order."""
    assert arena.alike is not None
    scores = arena.alike[arena.names.index(name)].copy()
    scores[arena.names.index(name)] = np.inf
    best = np.argsort(-scores, kind="stable")[:size]
    return tuple(arena.names[k] for k in sorted(best.tolist()))


def at_random(arena: Arena, name: str, size: int) -> Set:
    others = [each for each in arena.names if each != name]
    drawn = Random(f"members {name}").sample(others, min(size - 1, len(others)))
    return tuple(each for each in arena.names if each in (name, *drawn))


def retrieved(arena: Arena, prompt: int, members: Set) -> Recipe:
    """The weights that retrieval gives these members for this prompt; who is left without any is no member."""
    places = [arena.names.index(name) for name in members]
    weights = mixture_weights(arena.similarity[prompt, places], WEIGHTS, SPREAD).tolist()
    kept = {name: weight for name, weight in zip(members, weights, strict=True) if weight > 0}
    return Recipe(tuple(kept), tuple(kept.values()))


def measure(blended: Blended, row: Row, column: Mapping[int, Recipe]) -> dict[int, bool]:
    """Of every prompt in a column: is the answer right to the letter?"""
    shared: dict[Recipe, list[int]] = defaultdict(list)
    for n, recipe in column.items():
        shared[prepared(blended, row, n, recipe)].append(n)
    prompts, right = blended.arena.prompts, dict[int, bool]()
    for recipe, numbers in shared.items():
        settings = row.settings
        if row.operator == "layer_swap":
            settings = {"layers": in_turn(recipe.members, blended.arena.model.config.num_hidden_layers)}
        with blended.loaded(recipe, row.operator, settings):
            replies = blended.replies([prompts[n].text for n in numbers])
        right |= {n: reply == prompts[n].answer for n, reply in zip(numbers, replies, strict=True)}
    return right


def prepared(blended: Blended, row: Row, prompt: int, recipe: Recipe) -> Recipe:
    """The recipe that a row makes of a column's."""
    asked = blended.arena.prompts[prompt]
    if row.fixed is not None:
        return row.fixed(blended.arena, asked)
    members = recipe.members
    if row.search is not None:
        return Recipe(members, blended.found(row.search, asked.owners, members))
    return Recipe(members, tuple(len(members) * w for w in recipe.weights)) if row.sums else recipe


def in_turn(members: Set, layers: int) -> dict[str, str]:
    """`layer_swap`'s assignment: the lower layers are the first member's, the upper ones the last's, equal shares."""
    edges = [round(k * layers / len(members)) for k in range(len(members) + 1)]
    return {
        name: f"{first}-{last - 1}"
        for name, first, last in zip(members, edges, edges[1:], strict=False)
        if last > first
    }


def share(right: Sequence[bool], tasks: Sequence[Set]) -> Share:
    """The interval is for other tasks of this kind: whole tasks are drawn (`eval.intervals`)."""
    values = np.array(right, float)
    found = estimate(lambda rows: float(values[rows].mean()), [Groups(tasks)])
    return Share(found.value, found.low, found.high, len(values))


def results(blended: Blended, rows: Sequence[Row], found: Columns, cache: Path | None) -> Iterator[dict[str, Share]]:
    """For each row its shares by column. What is in the cache is not measured again."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(rows) * len(found))
        for row in rows:
            kind = OPERATORS[row.operator].statistic
            file = cache and cache / f"{row.name.replace('`', '')}.json"
            known = json.loads(file.read_text()) if file and file.exists() else {}
            shares = {}
            for name, column in found.items():
                progress.update(task, description=f"{row.name}, {name}".replace("`", ""))
                if row.search is None or name != WEIGHED:  # a search finds its own
                    if name not in known:
                        if kind is not None and kind not in blended.statistics:
                            blended.measure(kind, blended.arena.names)
                        right = measure(blended, row, column)
                        known[name] = [right[n] for n in column]
                    shares[name] = share(known[name], [blended.arena.prompts[n].owners for n in column])
                progress.advance(task)
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(known) + "\n")
            yield shares


def main(
    prompts: Annotated[int, typer.Option(min=1, max=60, help="Test prompts of each expert.")] = 12,
    seed: Annotated[int, typer.Option(help="Which of them.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help="Rows whose name starts like this; repeatable.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Keep what was right here, and go on from there.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here as well.")] = None,
) -> None:
    torch.set_num_threads(1)
    arena = load(prompts, seed)
    found = columns(arena)
    rows = [row for row in ROWS if not only or row.name.replace("`", "").startswith(tuple(only))]
    typer.echo(f"| exact match | {' | '.join(found)} |")
    typer.echo(f"|---|{'---:|' * len(found)}")
    written = []
    kept = cache / f"{prompts} prompts, seed {seed}" if cache else None
    for row, shares in zip(rows, results(Blended(arena), rows, found, kept), strict=False):
        cells = [cell(shares[name]) if name in shares else "" for name in found]
        typer.echo(f"| {row.name} | {' | '.join(cells)} |")
        written.append({"name": row.name.replace("`", ""), **{name: asdict(each) for name, each in shares.items()}})
    if json_file is not None:
        json_file.write_text(json.dumps(written, indent=1) + "\n")


def cell(share: Share) -> str:
    return f"{share.exact:.3f} [{share.low:.2f}, {share.high:.2f}]"


if __name__ == "__main__":
    typer.run(main)
