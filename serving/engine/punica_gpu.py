"""Multi-LoRA on a GPU: vLLM's own kernels, with a composite's gate between shrink and expand.

`add_shrink` and `add_expand` are overridden, not `add_lora_linear`: fully sharded layers call those two themselves,
with the ranks' parts of z joined or added in between. A group of modules is known by its number, which is fixed when
the model is traced; `at` gives each layer a wrapper that knows its own.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Self

from torch import Tensor
from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

from router.gating.layout import Layout
from serving.engine.batch import Batch
from serving.engine.gating import Gates, given_weights
from serving.engine.gpu_tables import NotOnGpu, Tables, refuse
from serving.engine.kernels import gate_op, measure_op
from serving.engine.slots import Group, SlotAdapter


class GatedMixin:
    """What our wrapper adds to vLLM's. Apart from it, so that tests can put it on a shrink and expand in torch."""

    tables: Tables | None = None
    group: int | None = None
    token_mapping_meta: Any
    lora_config: Any
    device: Any
    _token_lora_indices: Tensor

    # What serving.engine.private tells every wrapper.

    def set_groups(self, groups: Sequence[Group]) -> None:
        """All places of the model where adapters act."""
        sizes, tokens = [len(group.modules) for group in groups], len(self._token_lora_indices)
        self.tables = Tables(self.lora_config.max_loras, sizes, self.lora_config.max_lora_rank, tokens, self.device)
        self.gates = Gates(len(groups))  # begins no step: on GPUs nothing is traced and no gate has state
        self._composites: dict[int, SlotAdapter] = {}
        self._given = False  # whether the last step left weights behind

    def at(self, index: int) -> Self:
        """This wrapper as the layer of group `index` has it; all tensors are shared."""
        mine = copy.copy(self)
        mine.group = index
        return mine

    def reasons_against(self, layout: Layout) -> list[str]:
        """Why the kernel cannot do what this layout asks for."""
        try:
            refuse(layout, tensor_parallel())
        except NotOnGpu as error:
            return [str(error)]
        return []

    def set_slot(self, slot: int, adapter: SlotAdapter | None) -> None:
        """What `slot` holds from now on. Raises NotOnGpu."""
        assert self.tables is not None
        self.tables.clear(slot)
        self._composites.pop(slot, None)
        if adapter is None or adapter.layout is None:
            return
        refuse(adapter.layout, tensor_parallel())
        places = {
            index: ([part.module for part in share.parts], share.table)
            for index, share in adapter.shares.items()
            if share.table is not None
        }
        self.tables.fill(slot, adapter.layout, places)
        self._composites[slot] = adapter

    def set_step(self, batch: Batch) -> None:
        """The requests of the coming step that are for composites; called when the step's tokens have their slots."""
        assert self.tables is not None
        if self._given:
            self.tables.given.fill_(float("nan"))
            self._given = False
        for slot, adapter in self._composites.items():
            requests = [request for request in batch.requests if request.slot == slot]
            if adapter.gate is None or not adapter.gate.takes_weights or not any(r.arguments for r in requests):
                continue
            assert adapter.layout is not None
            weights = given_weights(requests, adapter.gate, len(adapter.layout.members))
            if weights is not None:
                rows = (self._token_lora_indices == slot).nonzero()[: len(weights), 0]
                self.tables.given[rows, : weights.shape[1]] = weights.to(self.tables.given)
                self._given = True

    # What vLLM calls.

    def add_shrink(self, y: Tensor, x: Tensor, lora_a_stacked: tuple[Tensor, ...], scale: float, **kwargs: Any) -> None:
        """`y[i] = A_i x` (n, tokens, r), and what gates divide by, of x."""
        super().add_shrink(y, x, lora_a_stacked, scale, **kwargs)  # type: ignore[misc]
        if self.tables is not None and self.group is not None:
            x = x.view(-1, x.shape[-1])
            measure_op(x, self._slots(len(x)), self.tables.plan, self.tables.measures)

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
        """`y[:, slice i] += B_i gate(x[i])` with x (n, tokens, r_max), gated in place."""
        if self.tables is not None and self.group is not None:
            T = x.shape[1]
            tables = self.tables.of(self.group)
            gate_op(x, self._slots(T), self.tables.measures[:T], self.tables.given[:T], tables)
        super().add_expand(y, x, lora_b_stacked, output_slices, offset_start, add_inputs, **kwargs)  # type: ignore[misc]

    def _slots(self, tokens: int) -> Tensor:
        """(T,) int32, each token's slot or -1: the tensor that vLLM's kernels read."""
        slots: Tensor = self.token_mapping_meta.token_lora_mapping[:tokens]
        return slots


class GatedPunicaWrapperGPU(GatedMixin, PunicaWrapperGPU):  # type: ignore[misc]
    """vLLM's wrapper, gated."""


def tensor_parallel() -> int:
    """How many GPUs share a layer; 1 outside an engine."""
    from vllm.distributed import get_tensor_model_parallel_world_size, model_parallel_is_initialized

    return int(get_tensor_model_parallel_world_size()) if model_parallel_is_initialized() else 1
