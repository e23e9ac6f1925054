"""What a gate is: from the rank-space buffer of one composite to one weight per token and expert.

Shapes. `t` tokens; `n` modules that share an input (q, k, v; gate, up), otherwise 1; `R` stacked rank rows;
`K` experts. The buffer is `z = A x (t, n, R)`, what a multi-LoRA kernel holds between its shrink and its expand.
Multiplying block k of z by `g_k` gives exactly `sum_k g_k s_k B_k A_k x` (docs/token-level-routing.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from router.gating.blocks import Blocks, mean_over_modules
from router.gating.layout import Form, Layout
from router.taxonomy import Taxonomy

Normalise = Literal["none", "rms", "unit", "zscore"]
#: What gates that read nothing but the experts' weights have in common; each says where it differs.
WEIGHTS_ONLY = Taxonomy(
    expert_training="standard",
    expert_data="private",
    routing_data="none",
    input="step",
    depth="module",
    selection="sparse",
    aggregation="output",
    generalization="out-of-distribution",
    user_data="zero-shot",
)
TINY = 1e-12  # a length or deviation under this is taken for it, so that a zero input has scores of zero


class Settings(BaseModel):
    """A gate without settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class GateSettings(Settings):
    """What every gate that scores experts has.

    top_k        experts that answer a token; None: all members
    temperature  of the softmax over scores
    normalise    none:   the score as published
                 unit:   divided by the length of x;  rms: divided by the root mean square of x
                 zscore: (score - mean) / deviation, measured over neutral prompts for each expert and module
    centred      score x - m instead of x, with m the module's mean input over neutral prompts
    shared       one set of weights for modules that share an input (q, k, v; gate, up), from their mean score
    """

    top_k: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    normalise: Normalise = "none"
    centred: bool = False
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

    @cached_property
    def absent(self) -> Tensor | None:
        """(n, K) bool, which experts do not adapt which module; None when all do."""
        return None if self.present is None else ~self.present

    @cached_property
    def loudest(self) -> Tensor:
        """(n, K) s * sigma_1: by how much an expert amplifies its prototype."""
        assert self.scale is not None
        return self.scale[:, list(self.layout.starts)]


class Evidence(Protocol):
    """Running evidence of the requests in a step, for gates that carry state."""

    def add(self, index: int, score: Tensor) -> Tensor:
        """`score (t, K)` of group `index`, -> (t, K): the scores of this and earlier tokens of the request in this
        and earlier groups. Causal in both, so the answer does not depend on how a request is cut into steps.
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

    @cached_property
    def log_prior(self) -> Tensor:
        """(t, K) logarithm of the weights that a request brought along, 0 without: uniform."""
        assert self.given is not None
        return torch.where(self.given.isnan(), 0.0, self.given.log())


NOTHING = Step()


class Gate(ABC):
    """A gate of one composite. It has no state of its own, so one instance serves all modules and threads.

    A new gate is one file with a subclass, one line in `router.gating`, one test, one docs row.
    What depends on the settings (`form`, `needs_scale`) is set by `__init__`; the class says what holds by default.
    """

    taxonomy: ClassVar[Taxonomy]
    equation: ClassVar[str]  # the score of expert k, for the docs
    reads: ClassVar[str]  # where in the buffer it is found
    Settings: ClassVar[type[Settings]] = Settings
    form: Form = "scaled"  # how the blocks must be written
    extra: ClassVar[bool] = False  # needs one extra row for each expert, from a vector stored under the gate's name
    needs_scale: bool = False  # needs Table.scale
    needs_length: bool = False  # needs Step.length
    needs_spread: bool = False  # needs Step.spread
    stateful: ClassVar[bool] = False  # needs Step.evidence
    takes_weights: ClassVar[bool] = False  # reads Step.given: a request may bring weights along

    def __init__(self, layout: Layout, device: torch.device | str = "cpu") -> None:
        self.layout = layout
        self.blocks = Blocks(layout.blocks, device)
        self.settings: Any = self.Settings.model_validate(layout.settings)

    @classmethod
    def row(cls, vector: Tensor) -> Tensor:
        """The extra row (d_in,) that A gets for an expert's stored vector (d_in,)."""
        return vector

    @abstractmethod
    def weights(self, z: Tensor, table: Table, step: Step) -> Tensor:
        """(t, n, R) -> (t, n, K) the weight of every expert."""

    def __call__(self, z: Tensor, table: Table, step: Step = NOTHING) -> Tensor:
        """Multiply z (t, n, R) by its weights, in place; gives the weights (t, n, K)."""
        weights = self.weights(z, table, step)
        self.blocks.multiply(z, weights)
        return weights


class ScoreGate(Gate):
    """A softmax over the top k scores: all that most methods differ in is `score`."""

    Settings: ClassVar[type[Settings]] = GateSettings
    name: str  # of the score, for its statistics

    def __init__(self, layout: Layout, device: torch.device | str = "cpu") -> None:
        super().__init__(layout, device)
        K = len(layout.members)
        self.k = min(self.settings.top_k or K, K)
        self.needs_length = self.settings.normalise in ("unit", "rms")

    @property
    def score_name(self) -> str:
        """What the statistics of the raw score are kept under."""
        return f"{self.name}-centred" if self.settings.centred else self.name

    @abstractmethod
    def score(self, z: Tensor, table: Table, step: Step) -> Tensor:
        """(t, n, R) -> (t, n, K) one score per expert, higher is better."""

    def raw(self, z: Tensor, table: Table, step: Step) -> Tensor:
        """(t, n, R) -> (t, n, K) what z-scores are made of: centred and divided by the input's length if so set."""
        scores = self.score(self.centred(z, table), table, step)
        if not self.needs_length:
            return scores
        assert step.length is not None
        length = step.length.clamp_min(TINY)
        return scores * (step.d_in**0.5) / length if self.settings.normalise == "rms" else scores / length

    def scores(self, z: Tensor, table: Table, step: Step) -> Tensor:
        """(t, n, R) -> (t, n, K) raw scores, z-scored if so set."""
        raw = self.raw(z, table, step)
        if self.settings.normalise != "zscore":
            return raw
        assert table.mean is not None
        assert table.deviation is not None
        return (raw - table.mean) / table.deviation

    def weights(self, z: Tensor, table: Table, step: Step) -> Tensor:
        """(t, n, R) -> (t, n, K) softmax over the top k, 0 for experts that are absent from the module."""
        scores = self.pooled(self.scores(z, table, step), table)
        weights = top_softmax(scores, self.k, self.settings.temperature)
        return weights if table.absent is None else weights.masked_fill_(table.absent, 0.0)  # NaN where all are absent

    def centred(self, z: Tensor, table: Table) -> Tensor:
        if not self.settings.centred:
            return z
        assert table.centre is not None
        return z - table.centre

    def pooled(self, scores: Tensor, table: Table) -> Tensor:
        """(t, n, K) -> (t, n, K) the same for all modules if so set; -inf for absent experts."""
        if self.settings.shared and scores.shape[1] > 1:
            scores = mean_over_modules(scores, table.present)
        return scores if table.absent is None else scores.masked_fill(table.absent, float("-inf"))


def top_softmax(scores: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    """(..., K) -> (..., K) softmax over the k highest scores, 0 for the others."""
    if temperature != 1.0:
        scores = scores / temperature
    if k == scores.shape[-1]:
        return torch.softmax(scores, -1)
    best, which = scores.topk(k, -1)  # (..., k)
    return torch.zeros_like(scores).scatter_(-1, which, torch.softmax(best, -1))
