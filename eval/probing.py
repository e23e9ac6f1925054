"""Where in a prompt, and where in the model, experts' weights show which of them a prompt is for.

    python -m eval.probing [--prompts 12] [--seed 0] [--others]

Routing accuracy on the testbed of the expert with the most evidence in one pass of the base model: which score,
statistics over which neutral text, which tokens, which modules, with loud experts; and beside retrieval's prior, by
how much a unit of evidence counts. `--others` takes the test prompts that are left out otherwise.
Every prompt's rank-space rows are read once (`z`, unit form); all else is arithmetic on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Annotated

import torch
import typer
from torch import Tensor

from eval.arena import DATA, Arena, load
from eval.gates import TEMPERATURE
from eval.testbed.manifest import read_jsonl
from eval.testbed.words import WORDS
from eval.twin import Composite, Seen, Twin

LINES = 100  # of words without meaning together


@dataclass(frozen=True)
class Way:
    """How evidence is gathered. `modules` is part of a module's name; statistics are over the same tokens."""

    score: str = "spectr"
    centred: bool = False
    calibrated: bool = True
    neutral: str = "others' samples"
    last: bool = False  # the last token of a prompt only
    modules: str = "layers."
    count: int = 10**6  # neutral prompts at most
    loud: float = 1.0  # what every other expert's weights are multiplied with


class Readings:
    """z (tokens, modules, R) of every prompt, and of every neutral text."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.composite = Composite.stack(arena.folders, "probe", {"score": "smile", "normalise": "none"})
        self.modules = list(self.composite.factors)
        self.present = torch.stack([self.composite.tables[f"{m}.present"] for m in self.modules])  # (M, K)
        self.scale = torch.stack([self.composite.tables[f"{m}.scale"] for m in self.modules])  # (M, R)
        rows = torch.tensor([member.rows for member in self.composite.layout.members])
        self.owner = torch.nn.functional.one_hot(torch.arange(len(rows)).repeat_interleave(rows)).float()  # (R, K)
        self.prompts = self.read([prompt.text for prompt in arena.prompts])
        rng = Random(0)
        everyday = [row["prompt"] for row in read_jsonl(arena.data / "ood.jsonl")]
        words = [" ".join(rng.choices(WORDS, k=rng.randint(4, 9))) for _ in range(LINES)]
        self.neutral = {
            "others' samples": self.read([text for _, text in arena.samples]),
            "everyday requests": self.read(everyday),
            "lines of words": self.read(words),
        }

    def read(self, texts: Sequence[str]) -> list[Tensor]:
        found: list[Tensor] = []
        for text in texts:
            parts: dict[str, Tensor] = {}

            def watch(seen: Seen, parts: dict[str, Tensor] = parts) -> None:
                parts.update({m: seen.z[0, :, i] for i, m in enumerate(seen.modules)})

            Twin(self.arena.model, self.composite, watch=watch).logprobs(self.arena.ids(text))
            found.append(torch.stack([parts[m] for m in self.modules], 1))
        return found

    def score(self, z: Tensor, way: Way) -> Tensor:
        """(t, M, R) -> (t, M, K)"""
        volume = torch.tensor([way.loud if k % 2 else 1.0 for k in range(self.owner.shape[1])])
        if way.score == "arrow":
            return z[..., list(self.composite.layout.starts)].abs()
        if way.score == "spectr":
            z = z * self.scale * (self.owner @ volume)
        return (z.square() @ self.owner).sqrt()

    def evidence(self, way: Way) -> Tensor:
        """(prompts, K)"""
        chosen = torch.tensor([way.modules in module for module in self.modules])
        tokens = slice(-1, None) if way.last else slice(None)
        neutral = self.neutral[way.neutral]
        order = Random(0).sample(range(len(neutral)), min(way.count, len(neutral)))
        z = torch.cat([neutral[n][tokens] for n in order])  # (t, M, R)
        owners = [self.arena.samples[n][0] if way.neutral == "others' samples" else "" for n in order]
        count = torch.tensor([len(neutral[n][tokens]) for n in order])
        counts = torch.tensor([[owner != name for name in self.arena.names] for owner in owners])
        weight = counts.repeat_interleave(count, 0).float()  # (t, K)
        weight = weight / weight.sum(0)
        centre = torch.einsum("tk,tmr,rk->mr", weight, z, self.owner) if way.centred else torch.zeros_like(z[0])
        raw = self.score(z - centre, way)
        mean = torch.einsum("tk,tmk->mk", weight, raw) * way.calibrated
        deviation = (torch.einsum("tk,tmk->mk", weight, raw.square()) - mean.square()).clamp_min(1e-12).sqrt()
        if not way.calibrated:
            deviation = torch.ones_like(mean)
        counted = self.present & chosen[:, None]
        scores = [(self.score(each[tokens] - centre, way) - mean) / deviation * counted for each in self.prompts]
        return torch.stack([each.sum((0, 1)) for each in scores])

    def accuracy(self, evidence: Tensor) -> list[float]:
        """Of all, of instruction-told and of input-told prompts; of all among the four that retrieval shortlists."""
        own = self.arena.owned()
        right = (evidence.argmax(1) == own).float()
        told = torch.tensor([prompt.told == "input" for prompt in self.arena.prompts])
        among = torch.tensor([[n in s for n in self.arena.names] for s in self.arena.shortlists(4)])
        listed = (evidence.masked_fill(~among, float("-inf")).argmax(1) == own).float()
        return [float(each.mean()) for each in (right, right[~told], right[told], listed)]

    def with_prior(self, evidence: Tensor, beta: float) -> list[float]:
        """`accuracy` of softmax(log prior + beta E), and its log loss."""
        log = (self.arena.prior(TEMPERATURE).log() + beta * evidence).log_softmax(1)
        return [*self.accuracy(log), -float(log.gather(1, self.arena.owned()[:, None]).mean())]


BETAS = (0.0, 0.0003, 0.001, 0.002, 0.003, 0.005, 0.01, 0.03, 0.1, 0.3)
PLAIN = Way()
BEST = Way(last=True, modules="layers.3")
WAYS: dict[str, Way] = {
    "all tokens, all modules": PLAIN,
    "score arrow": replace(PLAIN, score="arrow"),
    "score smile": replace(PLAIN, score="smile"),
    "centred": replace(PLAIN, centred=True),
    "centred smile": replace(PLAIN, score="smile", centred=True),
    "not calibrated": replace(PLAIN, calibrated=False),
    "calibrated on everyday requests": replace(PLAIN, neutral="everyday requests"),
    "calibrated on lines of words": replace(PLAIN, neutral="lines of words"),
    "last layer": replace(PLAIN, modules="layers.3"),
    "last token": replace(PLAIN, last=True),
    "last token, first layer": replace(BEST, modules="layers.0"),
    "last token, second layer": replace(BEST, modules="layers.1"),
    "last token, third layer": replace(BEST, modules="layers.2"),
    "last token, last layer": BEST,
    "... score arrow": replace(BEST, score="arrow"),
    "... score smile": replace(BEST, score="smile"),
    "... centred": replace(BEST, centred=True),
    "... not calibrated": replace(BEST, calibrated=False),
    "... calibrated on everyday requests": replace(BEST, neutral="everyday requests"),
    "... calibrated on lines of words": replace(BEST, neutral="lines of words"),
    "... 8 neutral prompts": replace(BEST, count=8),
    "... 16 neutral prompts": replace(BEST, count=16),
    "... 32 neutral prompts": replace(BEST, count=32),
    "... every other expert 4 times as loud": replace(BEST, loud=4.0),
    "... every other expert 4 times as loud, not calibrated": replace(BEST, loud=4.0, calibrated=False),
    "last token, last layer: q_proj": replace(BEST, modules="layers.3.self_attn.q_proj"),
    "last token, last layer: o_proj": replace(BEST, modules="layers.3.self_attn.o_proj"),
    "last token, last layer: up_proj": replace(BEST, modules="layers.3.mlp.up_proj"),
    "last token, last layer: down_proj": replace(BEST, modules="layers.3.mlp.down_proj"),
}


def main(
    prompts: Annotated[int, typer.Option(min=1, max=60, help="Test prompts of each expert.")] = 12,
    seed: Annotated[int, typer.Option(help="Which of them.")] = 0,
    others: Annotated[bool, typer.Option("--others", help="All the other test prompts instead.")] = False,
    data: Annotated[Path, typer.Option(help="Folder of the testbed.")] = DATA,
) -> None:
    torch.set_num_threads(1)
    readings = Readings(load(prompts, seed, data, compositions=False, others=others))
    columns = "routed right | instruction-told | input-told | among the shortlist of 4"
    typer.echo(f"| evidence | {columns} |\n|---|{'---:|' * 4}")
    for name, way in WAYS.items():
        show(name, readings.accuracy(readings.evidence(way)))
    for name in ("all tokens, all modules", "last token", "last token, last layer"):
        evidence = readings.evidence(WAYS[name])
        typer.echo(f"\n| {name}, with the prior: beta | {columns} | log loss |\n|---|{'---:|' * 5}")
        for beta in BETAS:
            show(f"{beta:g}", readings.with_prior(evidence, beta))


def show(name: str, figures: Sequence[float]) -> None:
    typer.echo(f"| {name} | {' | '.join(f'{figure:.3f}' for figure in figures)} |")


if __name__ == "__main__":
    typer.run(main)
