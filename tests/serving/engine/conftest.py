"""A wrapper without an engine: groups with vLLM's stacked tensors, and adapters copied into slots as vLLM does it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from router.gating.layout import Layout
from serving.engine.batch import Batch, Request
from serving.engine.slots import Group, slot_adapter

SLOTS, MAX_RANK = 5, 16
#: name: (d_in, widths) of a tiny layer's groups, in the order of computation
SHAPES = {"qkv": (24, (16, 8, 8)), "o": (16, (24,)), "gate_up": (24, (32, 32)), "down": (32, (24,))}


@dataclass
class Bench:
    """One wrapper and its groups; `factors[slot][module] = (A, B)` is what was put into it."""

    wrapper: Any
    groups: list[Group]
    slots: int = SLOTS
    factors: dict[int, dict[str, tuple[Tensor, Tensor]]] = field(default_factory=dict)

    def random(self, seed: int, rank: int | Mapping[str, int]) -> dict[str, tuple[Tensor, Tensor]]:
        """Random (A, B) for every module; with a rank for each module, for those that it names."""
        g = torch.Generator().manual_seed(seed)
        factors = {}
        for group in self.groups:
            for module, width in zip(group.modules, group.widths, strict=True):
                if r := rank if isinstance(rank, int) else rank.get(module, 0):
                    A, B = torch.randn(r, group.d_in, generator=g), torch.randn(width, r, generator=g)
                    factors[module] = A / group.d_in**0.5, B / r**0.5
        return factors

    def fill(
        self,
        slot: int,
        factors: Mapping[str, tuple[Tensor, Tensor]],
        layout: Layout | None = None,
        tables: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        for group in self.groups:
            for i, module in enumerate(group.modules):
                group.A[i][slot], group.B[i][slot] = 0, 0
                if module in factors:
                    A, B = factors[module]
                    group.A[i][slot, 0, : len(A)], group.B[i][slot, 0, :, : len(A)] = A, B
        self.factors[slot] = dict(factors)
        ranks = {module: len(A) for module, (A, _) in factors.items()}
        self.wrapper.set_slot(slot, slot_adapter(self.groups, ranks, layout, tables))

    def cast(self, dtype: torch.dtype) -> None:
        """Adapters of this type from now on; all slots are empty."""
        stacks = [(tuple(a.to(dtype) for a in g.A), tuple(b.to(dtype) for b in g.B)) for g in self.groups]
        self.groups = [replace(group, A=A, B=B) for group, (A, B) in zip(self.groups, stacks, strict=True)]
        self.wrapper.set_groups(self.groups)

    def map(self, index: Tensor) -> None:
        """What `update_metadata` leaves behind after a step's mapping."""
        self.wrapper._token_lora_indices[: len(index)].copy_(index)
        self.wrapper.indices_len[0] = len(index)
        self.wrapper._segments = None

    def step(self, requests: Sequence[Request], **geometry: int) -> None:
        """The next step: rows of each request one after another."""
        slots = torch.tensor([request.slot for request in requests])
        self.map(slots.repeat_interleave(torch.tensor([request.tokens for request in requests])))
        composites = tuple(request for request in requests if request.slot in self.wrapper.gates.composites)
        self.wrapper.set_step(Batch(composites, **geometry))

    def linear(self, group: Group, x: Tensor, y: Tensor | None = None) -> Tensor:
        """`add_lora_linear` on y, or on zeros."""
        y = torch.zeros(len(x), sum(group.widths)) if y is None else y
        self.wrapper.add_lora_linear(y, x, group.A, group.B, 1.0, group.widths)
        return y

    def sharded(self, group: Group, x: Tensor) -> Tensor:
        """The same by `add_shrink` and `add_expand`, as the fully sharded layers of one rank call them."""
        y, buffer = torch.zeros(len(x), sum(group.widths)), torch.zeros(len(group.modules), len(x), MAX_RANK)
        self.wrapper.add_shrink(buffer, x, group.A, 1.0)
        self.wrapper.add_expand(y, buffer, group.B, group.widths, offset_start=0, add_input=True)
        return y


@pytest.fixture(autouse=True)
def _as_the_engine_runs() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def bench() -> Bench:
    from serving.engine.punica import SegmentPunicaWrapperCPU

    wrapper = SegmentPunicaWrapperCPU(512, 64, torch.device("cpu"), lora_config=SimpleNamespace(max_loras=SLOTS))
    groups = []
    for layer in range(2):
        for name, (d_in, widths) in SHAPES.items():
            A = tuple(torch.zeros(SLOTS, 1, MAX_RANK, d_in) for _ in widths)
            B = tuple(torch.zeros(SLOTS, 1, width, MAX_RANK) for width in widths)
            modules = tuple(f"layers.{layer}.{name}.{i}" for i in range(len(widths)))
            groups.append(Group(len(groups), f"layers.{layer}.{name}", modules, d_in, widths, A, B))
    wrapper.set_groups(groups)
    return Bench(wrapper, groups)
