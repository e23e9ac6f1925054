"""Whether a calibration keeps its promises on prompts that it never saw.

    python -m eval.confidence ../shared/routebench [--router NAME ...] [--only SET ...] [--half tune|report|all]

A router is fitted to each set's samples and calibrated on them alone; then the set's test prompts and its prompts out
of domain are asked. Printed are, before and after, the share of prompts out of domain that an expert answers, of those
whose right expert has the best score the share left to the base model, and the calibration error (prompts out of
domain weighed as a tenth of all); and of candidate sets, how often they hold the right expert, and their mean size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from eval.cli import specs_of
from eval.encodings import Remembering, default_folder
from eval.prompts import Prompts
from eval.routebench import Half, half_of, prompt_sets
from eval.routing import RouterSpec, experts_of
from eval.terminal import progress_bar
from router.calibrating import calibrate, calibration_error, outcome, weigh
from router.calibration import Calibration
from router.encoder import Backend, load_encoder
from router.held_out import HeldOut, hold_out
from router.method import Method, Query, fitted
from router.methods import METHODS
from router.router import Router, RouterSettings
from router.text import BUDGET, shorten

SHARE = 0.1  # of all prompts, those out of domain
ALPHAS = (0.2, 0.1, 0.05)
SETS = ("ni150 instance", "ni150 brief", "ni150 instruct", "flan48", "paraphrase")


def asked(method: Method, prompts: Prompts, encoder: Remembering) -> HeldOut:
    """What the method says of the test prompts and of those out of domain, in that order."""
    names = sorted(prompts.samples)
    everything = [(names.index(task), text) for task, text in prompts.test] + [(-1, text) for _, text in prompts.ood]
    vectors = encoder.encode([shorten(text.strip(), BUDGET) for _, text in everything])
    everyone = np.ones(len(names), bool)
    scores = np.stack(
        [
            method.score(Query(shorten(text.strip(), BUDGET), vector, everyone))
            for (_, text), vector in zip(everything, vectors, strict=True)
        ]
    )
    limits = np.zeros(len(scores)) if method.thresholds is None else method.thresholds[scores.argmax(axis=1)]
    own = np.array([whose for whose, _ in everything])
    return HeldOut(np.where(np.isfinite(scores), scores, -np.inf), limits, own, np.zeros(len(own), np.int64))


def promises(found: HeldOut, before: Calibration, after: Calibration) -> Iterator[str]:
    """Cells of a row: false accepts, losses, calibration error, then of each alpha coverage and size."""
    inside = found.own >= 0
    first = found.scores.argmax(axis=1) == found.own
    weights = weigh(found, SHARE)
    results = [outcome(found, each) for each in (before, after)]
    yield " -> ".join(f"{each.answered[~inside].mean():.3f}" for each in results)
    yield " -> ".join(f"{1 - each.answered[first].mean():.3f}" for each in results)
    yield " -> ".join(f"{calibration_error(each.confidence, each.right, weights):.3f}" for each in results)
    scores, own = found.scores[inside], found.own[inside]
    ranks = (scores > scores[np.arange(len(own)), own][:, None]).sum(axis=1)
    for alpha in ALPHAS:
        sizes = np.array([after.size(each, alpha) for each in scores])
        yield f"{(ranks < sizes).mean():.3f} of {sizes.mean():.1f}"


def rows(
    name: str, prompts: Prompts, spec: RouterSpec, encoder: Remembering, fars: Sequence[float]
) -> Iterator[list[str]]:
    """One row to a false-accept rate."""
    router = Router(encoder, RouterSettings(method=spec.method, methods={spec.method: dict(spec.settings)}))
    kind = METHODS[spec.method]
    settings = kind.Settings.model_validate(dict(spec.settings))
    library = router.refresh(experts_of(prompts.samples))
    method = fitted(kind, library, settings)
    with progress_bar(f"{name} {spec.name}") as tell:
        held = hold_out(kind, settings, library, tell=lambda done, of: tell("held out", done, of))
    found = asked(method, prompts, encoder)
    plain = Calibration(temperature=method.temperature)
    for far in fars:
        after, _ = calibrate(held, method, settings, far=far, share=SHARE)
        yield [name, spec.name, f"{far:g}", *promises(found, plain, after)]
    router.close()


def main(
    folder: Annotated[Path, typer.Argument(help="A routebench folder.", exists=True, file_okay=False)],
    router: Annotated[list[str] | None, typer.Option(help="As in `moerge eval routing`; repeatable.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Sets whose name starts like this; repeatable.")] = None,
    far: Annotated[list[float] | None, typer.Option(help="Wanted false-accept rates; repeatable.")] = None,
    half: Annotated[Half, typer.Option(help="Of the test prompts.")] = "report",
    backend: Annotated[Backend, typer.Option(help="What runs the encoder.")] = "auto",
) -> None:
    """Print a Markdown table."""
    encoder = Remembering(load_encoder(backend=backend), default_folder())
    sets = prompt_sets(folder)
    titles = ["set", "router", "far", "false accepts", "lost", "calibration error"]
    titles += [f"{1 - alpha:g} sets" for alpha in ALPHAS]
    typer.echo(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for name in SETS:
        if not name.startswith(tuple(only or [""])):
            continue
        prompts = half_of(sets[name](), half)
        texts = [shorten(text.strip(), BUDGET) for text in prompts.texts()]
        with progress_bar(name) as tell:
            encoder.prepare(texts, partial(tell, "encoding"))
        for spec in [spec for given in router or ["retrieval"] for spec in specs_of(given)]:
            for row in rows(name, prompts, spec, encoder, far or [0.05]):
                typer.echo(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    typer.run(main)
