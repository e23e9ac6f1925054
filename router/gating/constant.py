"""Constant weights: a mixture that something else decided on, for the composite or for one request."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from pydantic import FiniteFloat, model_validator
from torch import Tensor

from router.gating.gate import Gate, Settings, Step, Table
from router.gating.layout import Layout
from router.taxonomy import Reference, Taxonomy


class ConstantSettings(Settings):
    """weights  of the members, for requests that bring none; None: 1 / K each"""

    weights: tuple[FiniteFloat, ...] | None = None

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.weights is not None and not self.weights:
            raise ValueError("weights is an empty list; leave it out for a uniform mixture")
        return self


class Constant(Gate):
    """g_k = w_k whatever the token: LoraRetriever's mixture, LoraHub's and LoRAuter's weights.

    The sum of outputs sum_k w_k s_k B_k A_k x has no cross terms, unlike a sum of the factors.
    """

    equation: ClassVar[str] = "`w_k` itself"
    reads: ClassVar[str] = "nothing"
    taxonomy: ClassVar[Taxonomy] = Taxonomy(
        expert_training="standard",
        expert_data="private",
        routing_data="expert",
        input="example",
        depth="model",
        selection="dense",
        aggregation="output",
        generalization="out-of-distribution",
        user_data="zero-shot",
        reference=Reference(title="LoraRetriever's mixture (Zhao et al. 2024)", url="https://arxiv.org/abs/2402.09997"),
    )
    Settings: ClassVar[type[Settings]] = ConstantSettings
    takes_weights: ClassVar[bool] = True

    def __init__(self, layout: Layout, device: torch.device | str = "cpu") -> None:
        super().__init__(layout, device)
        K = len(layout.members)
        weights = self.settings.weights or (1 / K,) * K
        if len(weights) != K:
            raise ValueError(f"{len(weights)} weights for {K} members; there must be one each")
        self.default = torch.tensor(weights, device=device)

    def weights(self, z: Tensor, table: Table, step: Step) -> Tensor:
        t, n, _ = z.shape
        if step.given is None:
            return self.default.expand(t, n, -1)
        return torch.where(step.given.isnan(), self.default, step.given).unsqueeze(1).expand(-1, n, -1)
