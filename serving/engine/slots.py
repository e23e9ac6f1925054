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
    """One adapted module of a group: `y[:, start:stop] += z[:, first:used] B^T`.

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


@dataclass(frozen=True, eq=False)
class Share:
    """What an adapter changes in one group: its parts there, and its gate's table."""

    parts: tuple[Part, ...]
    table: Table | None = None


@dataclass(frozen=True, eq=False)
class SlotAdapter:
    """What a slot holds: a plain adapter (no gate) or a composite; `shares` by group index."""

    shares: Mapping[int, Share]
    layout: Layout | None = None
    gate: Gate | None = None
    groups: int = 0
    names: Mapping[int, tuple[str, ...]] = field(default_factory=dict)  # group index -> its adapted modules


class Packed(NamedTuple):
    """An adapter's factors in one group, without gaps: A (sum of ranks, d_in); Bt (rank, width) of each part."""

    share: Share
    A: Tensor
    Bt: tuple[Tensor, ...]


def slot_adapter(
    groups: Sequence[Group],
    ranks: Mapping[str, int],
    layout: Layout | None = None,
    tables: Mapping[str, Tables] | None = None,
) -> SlotAdapter:
    """An adapter of these `ranks`, by module; for a composite with its layout and its gate's constants by module."""
    gate = gate_of(layout) if layout is not None else None
    shares, names = {}, {}
    for group in groups:
        adapted = [i for i, module in enumerate(group.modules) if module in ranks]
        if adapted:
            names[group.index] = tuple(group.modules[i] for i in adapted)
            table = None if layout is None else table_of(group.index, names[group.index], layout, tables or {})
            parts = _parts(group, adapted, ranks, layout.extra if layout is not None else 0)
            shares[group.index] = Share(parts, table)
    return SlotAdapter(shares, layout, gate, len(groups), names)


def _parts(group: Group, adapted: Sequence[int], ranks: Mapping[str, int], extra: int) -> tuple[Part, ...]:
    parts, first = [], 0
    for i in adapted:
        rank, local = ranks[group.modules[i]], group.A[i].shape[2]
        mine = local if local < group.B[i].shape[3] else rank  # rows on this rank
        start = sum(group.widths[:i])
        parts.append(Part(i, first, first + mine, first + rank - extra, rank, start, start + group.widths[i]))
        first += mine
    return tuple(parts)


def pack(group: Group, slot: int, share: Share) -> Packed:
    """Copies, because the time of decoding is what it takes to read them from memory."""
    A = torch.cat([group.A[part.module][slot, 0, : part.last - part.first] for part in share.parts])
    if share.table is not None:
        A = A.float()  # scores are compared with each other: never in half precision
    Bt = [group.B[part.module][slot, 0, :, : part.used - part.first].T.contiguous() for part in share.parts]
    return Packed(share, A, tuple(Bt))


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
