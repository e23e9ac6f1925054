"""Two gates of our own: calibrated scores say little about one token, but they add up over a request."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from router.gating.arrow import Arrow
from router.gating.gate import Gate, Normalise, ScoreGate, Settings, Step, Table, top_softmax
from router.gating.layout import Layout
from router.gating.smile import Smile
from router.gating.spectr import SpectR
from router.taxonomy import Taxonomy

SCORES: dict[str, type[ScoreGate]] = {"arrow": Arrow, "spectr": SpectR, "smile": Smile}


class ProbeSettings(Settings):
    """score      whose score is evidence
    normalise  zscore: how unusually high the score is for this expert in this module; the others as for every gate
    centred    score x - m instead of x, with m the module's mean input over neutral prompts
    k_gate     how many of an expert's directions count (smile)
    """

    score: Literal["arrow", "spectr", "smile"] = "spectr"
    normalise: Normalise = "zscore"
    centred: bool = False
    k_gate: int = Field(default=16, ge=1)


class EvidenceSettings(ProbeSettings):
    """top_k  experts that answer a token; None: all members
    beta   how much a unit of evidence counts
    """

    top_k: int | None = Field(default=None, ge=1)
    beta: float = Field(default=0.03, gt=0)


class Probe(Gate):
    """E_k = sum over tokens and modules of (s_k - mean_k) / deviation_k, and g_k = 0.

    The base model answers while the evidence is read from the buffer, so that a prefill tells which expert the
    prompt is for; the decision is taken from the trace, once for the request.
    """

    equation: ClassVar[str] = "`E_k`, the sum of z-scores over the prompt; the base model answers"
    reads: ClassVar[str] = "as the gate whose score it is"
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        expert_training="standard",
        expert_data="private",
        routing_data="general",
        input="example",
        depth="model",
        selection="sparse",
        aggregation="none",
        generalization="out-of-distribution",
        user_data="zero-shot",
    )
    Settings: ClassVar[type[Settings]] = ProbeSettings
    stateful: ClassVar[bool] = True

    def __init__(self, layout: Layout, device: torch.device | str = "cpu") -> None:
        super().__init__(layout, device)
        chosen = {"normalise": self.settings.normalise, "centred": self.settings.centred}
        if self.settings.score == "smile":
            chosen["k_gate"] = self.settings.k_gate
        self.scorer = SCORES[self.settings.score](layout.model_copy(update={"settings": chosen}), device)
        self.form = self.scorer.form
        self.needs_length = self.scorer.needs_length

    def raw(self, z: Tensor, table: Table, step: Step) -> Tensor:
        return self.scorer.raw(z, table, step)

    def evidence(self, z: Tensor, table: Table, step: Step) -> Tensor:
        """(t, n, R) -> (t, K) all evidence of the request so far; an expert says nothing in a module it lacks."""
        assert step.evidence is not None
        scores = self.scorer.scores(z, table, step)
        if table.absent is not None:
            scores = scores.masked_fill(table.absent, 0.0)
        return step.evidence.add(table.index, scores.sum(1))

    def weights(self, z: Tensor, table: Table, step: Step) -> Tensor:
        self.evidence(z, table, step)
        return z.new_zeros(z.shape[0], z.shape[1], len(self.layout.members))


class Evidence(Probe):
    """g = softmax(log prior + beta E), E_k = sum of (s_k - mean_k) / deviation_k over this request's tokens up to this
    one and, of them all, over the modules passed so far. One pass, K floats of state for each module group.

    The prior is what a request brings along (retrieval's weights), else uniform. An expert that lacks a module keeps
    its weight there: it is the request that has an expert, not the module.
    """

    equation: ClassVar[str] = "`log prior_k + beta E_k`, `E_k` the sum of z-scores so far"
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        expert_training="standard",
        expert_data="private",
        routing_data="general",
        input="step",
        depth="module",
        selection="dense",
        aggregation="output",
        generalization="out-of-distribution",
        user_data="zero-shot",
    )
    Settings: ClassVar[type[Settings]] = EvidenceSettings
    takes_weights: ClassVar[bool] = True

    def __init__(self, layout: Layout, device: torch.device | str = "cpu") -> None:
        super().__init__(layout, device)
        K = len(layout.members)
        self.k = min(self.settings.top_k or K, K)

    def weights(self, z: Tensor, table: Table, step: Step) -> Tensor:
        logits = self.evidence(z, table, step) * self.settings.beta
        if step.given is not None:
            logits = logits + step.log_prior
        return top_softmax(logits, self.k).unsqueeze(1).expand(-1, z.shape[1], -1)
