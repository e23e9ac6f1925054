"""Multi-LoRA on the CPU: one matrix product per adapter present in the batch.

Stock vLLM gathers whole adapter weights for every token, and its slot index -1 ("no adapter") reads the
*last* slot: once all slots are full, a base-model request in a mixed batch is answered by somebody's
adapter. Here tokens without an adapter are never touched.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


class SegmentPunicaWrapperCPU(PunicaWrapperCPU):  # type: ignore[misc]
    """`y[t] += scale * B_s A_s x[t]` for every token t whose slot s is not -1."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._segments: list[tuple[int, torch.Tensor | None]] | None = None

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        super().update_metadata(*args, **kwargs)
        self._segments = None

    def segments(self) -> list[tuple[int, torch.Tensor | None]]:
        """(slot, token rows) for each slot of this step; rows are None when one slot owns every token."""
        if self._segments is None:
            index = self.token_lora_indices  # (tokens,)
            slots = torch.unique(index).tolist()
            whole = len(slots) == 1
            self._segments = [(s, None if whole else (index == s).nonzero()[:, 0]) for s in slots if s >= 0]
        return self._segments

    def add_lora_linear(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: tuple[torch.Tensor, ...],
        lora_b_stacked: tuple[torch.Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **kwargs: Any,
    ) -> None:
        """Add every adapter's part to `y (tokens, sum(output_slices))`, in place.

        `x (tokens, d_in)`; slice i has `A (slots, 1, r, d_in)` and `B (slots, 1, d_out_i, r)`.
        """
        y = y.view(-1, y.shape[-1])
        x = x.view(-1, x.shape[-1])
        for slot, rows in self.segments():
            x_s = x if rows is None else x[rows]  # (t, d_in)
            start = 0
            for a, b, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
                z = x_s @ a[slot, 0].T  # (t, r)
                delta = (z @ b[slot, 0].T).mul_(scale)  # (t, width)
                part = y[:, start : start + width]
                if rows is None:
                    part += delta
                else:
                    part.index_add_(0, rows, delta)
                start += width
