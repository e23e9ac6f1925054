"""A wrapper without an engine: groups with vLLM's stacked tensors, and adapters copied into slots as vLLM does it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from router.gating import GATES, gate_of
from router.gating.gate import Step
from router.gating.layout import Layout, Member
from serving.engine.batch import Batch, Request
from serving.engine.slots import Group, slot_adapter, table_of

SLOTS, MAX_RANK = 5, 16
K, ROWS = 3, 4  # a composite's experts, and the rank rows of each
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

    @staticmethod
    def layout_of(gate: str, rows: Sequence[int] = (ROWS,) * K, **settings: Any) -> Layout:
        members = tuple(Member(id=f"expert{k}", rows=r) for k, r in enumerate(rows))
        layout = Layout(gate=gate, settings=settings, members=members, extra=len(rows) if GATES[gate].extra else 0)
        return layout.model_copy(update={"form": gate_of(layout).form})

    @staticmethod
    def request(
        tokens: int, computed: int = 0, slot: int = 0, name: str = "a", blocks: Sequence[int] = (0,), **arguments: Any
    ) -> Request:
        return Request(name, slot, tokens, computed, np.asarray(blocks), arguments)

    def compose(self, slot: int, layout: Layout, absent: bool = False) -> dict[str, dict[str, Tensor]]:
        """A random composite; gives its constants. With `absent`, the second expert lacks every second module."""
        g = torch.Generator().manual_seed(5)
        n = len(layout.members)
        found: dict[str, dict[str, Tensor]] = {}
        for i, module in enumerate(module for group in self.groups for module in group.modules):
            mean, deviation = torch.rand(n, generator=g), 0.5 + torch.rand(n, generator=g)
            scale, centre = 0.5 + torch.rand(layout.rank, generator=g), torch.randn(layout.rank, generator=g)
            found[module] = {"mean": mean, "deviation": deviation, "scale": scale, "centre": centre}
            if absent:
                found[module]["present"] = torch.tensor([True, i % 2 == 0, True])
        self.fill(slot, self.random(slot, layout.rank), layout, found)
        return found

    def explicit(
        self,
        group: Group,
        layout: Layout,
        constants: Mapping[str, Mapping[str, Tensor]],
        x: Tensor,
        evidence: Any = None,
        given: Tensor | None = None,
    ) -> Tensor:
        """y = sum_k g_k B_k A_k x for the composite in slot 0, one expert and module at a time."""
        modules = group.modules
        z = torch.stack([x @ self.factors[0][module][0].T for module in modules], 1)  # (t, n, R)
        table = table_of(group.index, modules, layout, constants)
        length, spread = x.norm(dim=-1)[:, None, None], x.std(-1, correction=0)[:, None, None]
        gated = z.clone()
        weights = gate_of(layout)(gated, table, Step(length, spread, given, evidence, group.d_in))  # (t, n, K)
        if layout.gate == "hilora":  # it weighs single directions
            return torch.cat([gated[:, i] @ self.factors[0][m][1].T for i, m in enumerate(modules)], 1)
        y = torch.zeros(len(x), sum(group.widths))
        for i, module in enumerate(modules):
            A, B = self.factors[0][module]
            for k, (start, rows) in enumerate(zip(layout.starts, layout.blocks, strict=True)):
                dW = B[:, start : start + rows] @ A[start : start + rows]
                columns = slice(sum(group.widths[:i]), sum(group.widths[: i + 1]))
                y[:, columns] += weights[:, i, k : k + 1] * (x @ dW.T)
        return y

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
