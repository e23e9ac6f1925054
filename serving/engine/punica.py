"""Multi-LoRA on the CPU: one matrix product per adapter present in the batch, at its own rank.

Stock vLLM gathers whole adapter weights, padded to the largest rank, for every token; and its slot index -1 ("no
adapter") reads the *last* slot: once all slots are full, a base-model request in a mixed batch is answered by
somebody's adapter. Here tokens without an adapter are never touched, and modules that share an input share one
product `z = x A^T`. Between it and the products with B, the gate of a composite weighs the blocks of z.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from router.gating.gate import Table
from serving.engine.batch import Batch
from serving.engine.gating import Gates, SlotStep, Spread, spread_of, spread_of_shares
from serving.engine.slots import Group, Packed, SlotAdapter, pack

#: Rows of the batch: all (None), a range, or an index.
Rows = slice | Tensor | None


def all_reduce(tensor: Tensor) -> Tensor:
    """Sum over the tensor-parallel ranks."""
    from vllm.distributed import tensor_model_parallel_all_reduce

    reduced: Tensor = tensor_model_parallel_all_reduce(tensor)
    return reduced


class SegmentPunicaWrapperCPU(PunicaWrapperCPU):  # type: ignore[misc]
    """`y[t] += B_s gate(A_s x[t])` for every token t whose slot s is not -1."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gates = Gates(0)
        self._groups: dict[int, Group] = {}  # by address of the stacked A and B of its first module
        self._packed: dict[int, dict[int, Packed]] = {}  # by slot and group
        self._segments: list[tuple[int, Rows]] | None = None
        self._spreads: dict[int, Spread] = {}  # by slot, from a sharded layer's shrink to its expand

    # What serving.engine.private tells every wrapper.

    def set_groups(self, groups: Sequence[Group]) -> None:
        """All places of the model where adapters act."""
        self._groups = {stacked[0].data_ptr(): group for group in groups for stacked in (group.A, group.B)}
        self._by_index = list(groups)
        self.gates = Gates(len(groups))

    def set_slot(self, slot: int, adapter: SlotAdapter | None) -> None:
        """What `slot` holds from now on."""
        self.gates.set_slot(slot, adapter)
        self._packed.pop(slot, None)
        if adapter is not None:
            self._packed[slot] = {i: pack(self._by_index[i], slot, share) for i, share in adapter.shares.items()}

    def set_step(self, batch: Batch) -> None:
        """The requests of the coming step that are for composites."""
        self.gates.begin(batch)

    # What vLLM calls.

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        super().update_metadata(*args, **kwargs)
        self._segments = None

    def segments(self) -> list[tuple[int, Rows]]:
        """(slot, its rows) for each slot of this step."""
        if self._segments is None:
            index = self.token_lora_indices.cpu()
            self._segments = [(s, rows_of(index == s)) for s in torch.unique(index).tolist() if s >= 0]
        return self._segments

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """Add every adapter's part to `y (tokens, sum(output_slices))`, in place; x (tokens, d_in)."""
        group = self._groups[lora_a_stacked[0].data_ptr()]
        x, y = self._unpadded(x), self._unpadded(y)
        for slot, rows in self.segments():
            packed = self._packed[slot].get(group.index)
            if packed is None:
                continue
            x_s = x if rows is None else x[rows]  # (t, d_in)
            z = shrink(x_s, packed)  # (t, sum of ranks)
            parts = packed.share.parts
            if packed.share.table is not None:
                step = self.gates.step(slot)
                spread = spread_of(x_s) if step is not None and step.needs_spread else None
                gate_(z.view(len(z), len(parts), -1), step, packed.share.table, group, spread)
            expand(y, rows, [z[:, part.first : part.used] for part in parts], packed, 0)

    def add_shrink(self, y: Tensor, x: Tensor, lora_a_stacked: tuple[Tensor, ...], scale: float, **kwargs: Any) -> None:
        """`y[i] = A_i x`, (modules, tokens, r); the ranks then add up or join what each has of it."""
        group = self._groups[lora_a_stacked[0].data_ptr()]
        x = self._unpadded(x)
        for slot, rows in self.segments():
            packed = self._packed[slot].get(group.index)
            if packed is None:
                continue
            x_s = x if rows is None else x[rows]
            z = shrink(x_s, packed).to(y.dtype)
            for part in packed.share.parts:
                y[part.module, : len(x), : part.last - part.first][every(rows)] = z[:, part.first : part.last]
            step = self.gates.step(slot) if packed.share.table is not None else None
            if step is not None and step.needs_spread:
                whole = x_s.shape[-1] == group.d_in
                self._spreads[slot] = spread_of(x_s) if whole else spread_of_shares(x_s, group.d_in, all_reduce)

    def add_expand(
        self,
        y: Tensor,
        x: Tensor,
        lora_b_stacked: tuple[Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """`y[:, slice i] += B_i x[i]` with x (modules, tokens, r_max), whole."""
        group = self._groups[lora_b_stacked[0].data_ptr()]
        y, tokens = self._unpadded(y), self.indices_len[0]
        for slot, rows in self.segments():
            packed = self._packed[slot].get(group.index)
            if packed is None:
                continue
            z = [x[part.module, :tokens, : part.rank][every(rows)] for part in packed.share.parts]
            if packed.share.table is not None:
                stacked = torch.stack(z, 1)  # (t, n, R)
                gate_(stacked, self.gates.step(slot), packed.share.table, group, self._spreads.pop(slot, None))
                z = [z_i[:, : len(Bt)] for z_i, Bt in zip(stacked.unbind(1), packed.Bt, strict=True)]
            expand(y, rows, z, packed, offset_start)

    def _unpadded(self, tensor: Tensor) -> Tensor:
        """Rows of tokens only: what pads a batch belongs to nobody."""
        tokens = self.indices_len[0]
        return tensor if tensor.shape[0] == tokens else tensor[:tokens]


def rows_of(mask: Tensor) -> Rows:
    """None or a range where the rows lie side by side, because a view is much cheaper than an index."""
    rows = mask.nonzero()[:, 0]
    if len(rows) == len(mask):
        return None
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows


def every(rows: Rows) -> slice | Tensor:
    return slice(None) if rows is None else rows


def shrink(x: Tensor, packed: Packed) -> Tensor:
    """x (t, d_in) -> (t, sum of ranks), all modules of the group at once."""
    return torch.mm(x if x.dtype == packed.A.dtype else x.to(packed.A.dtype), packed.A.T)


def gate_(z: Tensor, step: SlotStep | None, table: Table, group: Group, spread: Spread | None) -> None:
    """Multiply z (t, n, R) by the gate's weights, in place."""
    if step is None:  # a dry run of the engine's own: nobody reads its output, and nothing may be remembered
        z.zero_()
    else:
        step.gate_(z, table, group.d_in, spread)


def expand(y: Tensor, rows: Rows, z: Sequence[Tensor], packed: Packed, offset: int) -> None:
    """`y[rows, start:stop] += z_i B_i^T` for every adapted module i; z_i (t, rank)."""
    if isinstance(rows, slice):
        y, rows = y[rows], None
    for z_i, part, Bt in zip(z, packed.share.parts, packed.Bt, strict=True):
        y_i = y[:, offset + part.start : offset + part.stop]
        if z_i.dtype != Bt.dtype:
            z_i = z_i.to(Bt.dtype)
        if rows is not None:
            y_i.index_add_(0, rows, torch.mm(z_i, Bt).to(y.dtype))
        elif Bt.dtype == y.dtype:
            y_i.addmm_(z_i, Bt)
        else:
            y_i.add_(torch.mm(z_i, Bt))
