"""What a gate is: from the rank-space buffer of one composite to one weight per token and expert.

Shapes. `t` tokens; `n` modules that share an input (q, k, v; gate, up), otherwise 1; `R` stacked rank rows;
`K` experts. The buffer is `z = A x (t, n, R)`, what a multi-LoRA kernel holds between its shrink and its expand.
Multiplying block k of z by `g_k` gives exactly `sum_k g_k s_k B_k A_k x` (docs/token-level-routing.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from router.gating.layout import Form, Layout
from router.taxonomy import Taxonomy

Normalise = Literal["none", "rms", "unit", "zscore"]


class GateSettings(BaseModel):
    """top_k        experts that answer a token; None: all members
    temperature  of the softmax over scores
    normalise    none:   the score as published
                 unit:   divided by the length of x;  rms: divided by the root mean square of x
                 zscore: (score - mean) / deviation, measured over neutral prompts for each expert and module
    shared       one set of weights for modules that share an input (q, k, v; gate, up), from their mean score
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    top_k: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    normalise: Normalise = "none"
    shared: bool = False


@dataclass(frozen=True, eq=False)
class Table:
    """What a gate knows of one place in the model: one composite, one group of modules that share an input.

    index      which group of the model this is, 0, 1, ... in the order of computation
    layout     of the composite
    present    (n, K) bool, which experts adapt which module; None when all do
    scale      (n, R) s * sigma of every row, 1 for extra rows: scaled form = unit form * scale; None if not needed
    mean       (n, K) mean of the gate's raw score over neutral prompts; None when not calibrated
    deviation  (n, K) its standard deviation
    centre     (n, R) mean of z over neutral prompts; None when not calibrated
    """

    index: int
    layout: Layout
    present: Tensor | None = None
    scale: Tensor | None = None
    mean: Tensor | None = None
    deviation: Tensor | None = None
    centre: Tensor | None = None


class Evidence(Protocol):
    """Running evidence of the requests in a step, for gates that carry state."""

    def add(self, index: int, score: Tensor) -> Tensor:
        """`score (t, K)` of group `index`, -> (t, K): the request's prior plus the scores of this and earlier
        tokens in this and earlier groups. Causal in both, so the answer does not depend on how a request is cut
        into steps.
        """
        ...


@dataclass(frozen=True, eq=False)
class Step:
    """What else a gate may need for the tokens at hand.

    length    (t, 1, 1) Euclidean length of x; given when `gate.needs_length`
    spread    (t, 1, 1) standard deviation of x (biased); given when `gate.needs_spread`
    given     (t, K) weights that a request brought along (NaN rows: none); None when no request did
    evidence  given when `gate.stateful`
    d_in      length of x
    """

    length: Tensor | None = None
    spread: Tensor | None = None
    given: Tensor | None = None
    evidence: Evidence | None = None
    d_in: int = 1


NOTHING = Step()


class Gate(ABC):
    """A gate of one composite. It has no state of its own, so one instance serves all modules and threads.

    A new gate is one file with a subclass, one line in `router.gating`, one test, one docs row.
    """

    taxonomy: ClassVar[Taxonomy]
    Settings: ClassVar[type[GateSettings]] = GateSettings
    form: ClassVar[Form] = "scaled"
    extra: ClassVar[bool] = False  # needs one extra row for each expert
    needs_scale: ClassVar[bool] = False  # needs Table.scale
    needs_spread: ClassVar[bool] = False
    stateful: ClassVar[bool] = False  # needs Step.evidence

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.settings = self.Settings.model_validate(layout.settings)
        self.k = min(self.settings.top_k or len(layout.members), len(layout.members))
        self.needs_length = self.settings.normalise in ("unit", "rms")

    @abstractmethod
    def score(self, z: Tensor, table: Table, step: Step) -> Tensor:
        """(t, n, R) -> (t, n, K) one raw score per expert, higher is better."""

    def weigh(self, scores: Tensor, table: Table, step: Step) -> Tensor:
        """(t, n, K) scores -> (t, n, K) weights: softmax over the top k, 0 for experts absent from the module."""
        if self.settings.shared and scores.shape[1] > 1:
            scores = mean_over_modules(scores, table.present)
        if table.present is not None:
            scores = scores.masked_fill(~table.present, float("-inf"))
        if self.k == scores.shape[-1]:
            weights = torch.softmax(scores / self.settings.temperature, -1)
        else:
            best, which = scores.topk(self.k, -1)  # (t, n, k)
            shares = torch.softmax(best / self.settings.temperature, -1)
            weights = torch.zeros_like(scores).scatter_(-1, which, shares)
        return weights if table.present is None else weights.nan_to_num_(0.0)  # nobody adapts this module

    def __call__(self, z: Tensor, table: Table, step: Step = NOTHING) -> Tensor:
        """Multiply z (t, n, R) by its weights, in place; gives the weights (t, n, K)."""
        scores = self.normalised(self.score(z, table, step), table, step)
        weights = self.weigh(scores, table, step)
        apply_weights(z, weights, self.layout)
        return weights

    def normalised(self, scores: Tensor, table: Table, step: Step) -> Tensor:
        match self.settings.normalise:
            case "none":
                return scores
            case "unit":
                assert step.length is not None
                return scores / step.length
            case "rms":
                assert step.length is not None
                return scores * (step.d_in**0.5) / step.length
            case "zscore":
                assert table.mean is not None
                assert table.deviation is not None
                return (scores - table.mean) / table.deviation


def apply_weights(z: Tensor, weights: Tensor, layout: Layout) -> None:
    """Multiply block k of z (t, n, R) by weights[..., k], in place."""
    blocks = layout.blocks
    K = weights.shape[-1]
    total = sum(blocks)
    if all(rows == blocks[0] for rows in blocks):
        z[..., :total].unflatten(-1, (K, blocks[0])).mul_(weights.unsqueeze(-1))
    else:
        for part, weight in zip(torch.split(z[..., :total], blocks, -1), weights.unbind(-1), strict=True):
            part.mul_(weight.unsqueeze(-1))


def first_rows(z: Tensor, layout: Layout) -> Tensor:
    """(t, n, R) -> (t, n, K) the first row of every block."""
    blocks = layout.blocks
    if all(rows == blocks[0] for rows in blocks):
        return z[..., : sum(blocks) : blocks[0]]
    starts = [sum(blocks[:k]) for k in range(len(blocks))]
    return z[..., starts]


def mean_over_modules(scores: Tensor, present: Tensor | None) -> Tensor:
    """(t, n, K) -> (t, n, K) every module gets the mean over those modules that the expert adapts."""
    if present is None:
        return scores.mean(1, keepdim=True).expand_as(scores)
    share = present / present.sum(0, keepdim=True).clamp(min=1)  # (n, K)
    return (scores * share).sum(1, keepdim=True).expand_as(scores)


def norms(z: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """(t, n, R) -> (t, n, K) Euclidean length of every block."""
    return torch.stack([part.norm(dim=-1) for part in torch.split(z[..., : sum(blocks)], blocks, -1)], -1)
