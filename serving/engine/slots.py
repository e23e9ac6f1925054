"""Adapters as they lie in the engine's slots: where they act, their factors, and their gate.

A *group* is one place of the model: the linear modules that share an input (q, k, v; o; gate, up; down).
vLLM keeps `A (slots, 1, r_max, d_in)` and `B (slots, 1, width, r_max)` for each module of a group; here an
adapter has only its own rows of them, and one matrix A for all modules of a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from router.gating import gate_of
from router.gating.gate import Gate, Table
from router.gating.layout import Layout

#: Tables of one module, from the composite's `gate.safetensors`: "present", "scale", "mean", "deviation", "centre".
Tables = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Group:
    """One place of the model.

    index    order among the groups of the model, 0, 1, ...
    name     of the engine's layer (`model.layers.0.self_attn.qkv_proj`)
    modules  the adapters' names for its modules (`model.layers.0.self_attn.q_proj`, ...)
    d_in     length of the input, over all tensor-parallel ranks
    widths   columns of y that belong to each module, on this rank
    A        each module's `(slots, 1, r, d_in)`: r and d_in may be this rank's share
    B        each module's `(slots, 1, width, r_max)`
    """

    index: int
    name: str
    modules: tuple[str, ...]
    d_in: int
    widths: tuple[int, ...]
    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]


class Part(NamedTuple):
    """One adapted module of a group: `y[:, start:stop] += z[:, first:used] Bt`.

    `first:last` are its columns of the packed `z = x A^T`, of this tensor-parallel rank; `rank` is how many there
    are over all, `first:used` those that do not only feed a gate. `module` is its place in the group.
    """

    module: int
    first: int
    last: int
    used: int
    rank: int
    start: int
    stop: int
    Bt: Tensor  # (used rank, width)


@dataclass(frozen=True, eq=False)
class Factors:
    """An adapter's share in one group: `A (sum of ranks, d_in)`, its parts, and its gate's table."""

    A: Tensor
    parts: tuple[Part, ...]
    table: Table | None = None


@dataclass(frozen=True, eq=False)
class SlotAdapter:
    """What a slot holds: a plain adapter (no gate) or a composite; `factors` by group index."""

    factors: Mapping[int, Factors]
    layout: Layout | None = None
    gate: Gate | None = None
    groups: int = 0
    names: Mapping[int, tuple[str, ...]] = field(default_factory=dict)  # group index -> its adapted modules


def slot_adapter(
    slot: int,
    groups: Sequence[Group],
    ranks: Mapping[str, int],
    layout: Layout | None = None,
    tables: Mapping[str, Tables] | None = None,
) -> SlotAdapter:
    """The adapter that vLLM has just copied into `slot`; `ranks` of the modules (by their names) that it adapts."""
    gate = gate_of(layout) if layout is not None else None
    factors, names = {}, {}
    for group in groups:
        adapted = [i for i, module in enumerate(group.modules) if module in ranks]
        if adapted:
            names[group.index] = tuple(group.modules[i] for i in adapted)
            table = None if layout is None else table_of(group.index, names[group.index], layout, tables or {})
            factors[group.index] = _factors(slot, group, adapted, ranks, table)
    return SlotAdapter(factors, layout, gate, len(groups), names)


def _factors(slot: int, group: Group, adapted: Sequence[int], ranks: Mapping[str, int], table: Table | None) -> Factors:
    """Copies without gaps: in decoding, time is what it takes to read them from memory."""
    extra = 0 if table is None else table.layout.extra
    rows, parts, first = [], [], 0
    starts = [sum(group.widths[:i]) for i in range(len(group.widths))]
    for i in adapted:
        rank = ranks[group.modules[i]]
        sharded = group.A[i].shape[2] < group.B[i].shape[3]
        a = group.A[i][slot, 0] if sharded else group.A[i][slot, 0, :rank]
        Bt = group.B[i][slot, 0, :, : rank - extra].contiguous().T
        used, stop = first + rank - extra, starts[i] + group.widths[i]
        parts.append(Part(i, first, first + len(a), used, rank, starts[i], stop, Bt))
        rows.append(a)
        first += len(a)
    A = torch.cat(rows)
    if table is not None:
        A = A.float()  # scores are compared with each other: never in half precision
    return Factors(A, tuple(parts), table)


def table_of(index: int, modules: Sequence[str], layout: Layout, tables: Mapping[str, Tables]) -> Table:
    """The gate's constants at one group, stacked over its adapted modules."""

    def stacked(name: str, default: Tensor) -> Tensor | None:
        found = [tables.get(module, {}).get(name) for module in modules]
        if all(each is None for each in found):
            return None
        return torch.stack([default if each is None else each.to(default.dtype) for each in found])

    K, R = len(layout.members), layout.rank
    return Table(
        index=index,
        layout=layout,
        present=stacked("present", torch.ones(K, dtype=torch.bool)),
        scale=stacked("scale", torch.ones(R)),
        mean=stacked("mean", torch.zeros(K)),
        deviation=stacked("deviation", torch.ones(K)),
        centre=stacked("centre", torch.zeros(R)),
    )
