"""Every touch of vLLM's private API against what it expects.

When a new vLLM breaks one, the name of the failing test says which.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from types import SimpleNamespace

import pytest

from router.gating.layout import MARK
from serving.engine import private
from serving.engine.batch import TRACE, WEIGHTS

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]


def test_the_version_is_one_that_was_tested():
    private.check_version()


def test_another_version_is_refused_with_the_tested_one_named(monkeypatch):
    monkeypatch.setattr(private, "vllm_version", lambda: "0.99.0")
    with pytest.raises(RuntimeError, match=r"tested with vLLM 0\.32\.0; 0\.99\.0 is installed"):
        private.check_version()


def test_vllm_finds_the_plugin_and_builds_our_wrapper_on_a_cpu():
    program = (
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "from vllm.platforms import current_platform; print(current_platform.get_punica_wrapper())"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=True)
    assert ran.stdout.strip().endswith("serving.engine.punica.SegmentPunicaWrapperCPU")


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_stock_wrapper_takes_what_ours_overrides():
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU as Stock

    linear = ["self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices", "buffer", "kwargs"]
    expand = ["self", "y", "x", "lora_b_stacked", "output_slices", "offset_start", "add_inputs", "kwargs"]
    assert parameters(Stock.add_lora_linear) == linear
    assert parameters(Stock.add_shrink) == ["self", "y", "x", "lora_a_stacked", "scale", "kwargs"]
    assert parameters(Stock.add_expand) == expand
    assert isinstance(inspect.getattr_static(Stock, "token_lora_indices"), property)
    assert "mapping" in parameters(Stock.update_metadata)


def test_peft_s_helper_asks_one_method_which_inits_it_accepts():
    from vllm.lora.peft_helper import PEFTHelper

    assert "self._init_is_supported()" in inspect.getsource(PEFTHelper._validate_features)
    helper = PEFTHelper(r=4, lora_alpha=4, target_modules=["q_proj"], init_lora_weights=MARK)
    stock = inspect.unwrap(PEFTHelper._init_is_supported)
    assert not stock(helper), "without the plugin a composite must be refused"


def test_an_adapter_manager_gets_the_configuration_and_keeps_its_layers():
    from vllm.lora.model_manager import LoRAModelManager

    assert parameters(LoRAModelManager.__init__)[-1] == "vllm_config"
    source = inspect.getsource(LoRAModelManager)
    for name in ("modules", "packed_modules", "punica_wrapper_mapping", "lora_index_to_id", "lora_config", "model"):
        assert f"self.{name}" in source, name


def test_linear_layers_keep_stacked_factors_and_slices():
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    source = inspect.getsource(BaseLinearLayerWithLoRA)
    for name in ("lora_a_stacked", "lora_b_stacked", "output_slices", "base_layer", "punica_wrapper.add_lora_linear"):
        assert f"self.{name}" in source, name


def test_an_adapter_is_read_before_it_is_added():
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager

    assert parameters(WorkerLoRAManager._load_adapter) == ["self", "lora_request"]
    source = inspect.getsource(LRUCacheWorkerLoRAManager.add_adapter)
    assert source.index("self._load_adapter(") < source.index("self._adapter_manager.add_adapter(")


def test_a_slot_is_filled_by_one_method_and_emptied_by_another():
    from vllm.lora.model_manager import LoRAModelManager, LRUCacheLoRAModelManager

    assert parameters(LoRAModelManager.activate_adapter) == ["self", "lora_id"]
    assert parameters(LoRAModelManager._deactivate_adapter) == ["self", "lora_id"]
    assert "super().activate_adapter(lora_id)" in inspect.getsource(LRUCacheLoRAModelManager.activate_adapter)
    assert "self._deactivate_adapter" in inspect.getsource(inspect.unwrap(LoRAModelManager.__init__))


def test_a_step_names_its_requests_once_its_block_tables_are_ready():
    from vllm.v1.worker.gpu_input_batch import InputBatch
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    assert parameters(LoRAModelRunnerMixin.set_active_loras)[:3] == ["self", "input_batch", "num_scheduled_tokens"]
    assert "self._set_active_loras(" in inspect.getsource(inspect.unwrap(LoRAModelRunnerMixin.set_active_loras))
    prepare = inspect.getsource(GPUModelRunner._prepare_inputs)
    assert prepare.index("self.input_batch.block_table") < prepare.index("self.set_active_loras(")
    source = inspect.getsource(InputBatch)
    for name in ("req_ids", "request_lora_mapping", "num_computed_tokens_cpu", "block_table"):
        assert name in source, name
    assert "self.lora_manager = " in inspect.getsource(inspect.unwrap(LoRAModelRunnerMixin.load_lora_model))
    assert "self.kv_cache_config = " in inspect.getsource(GPUModelRunner.initialize_kv_cache)


def test_a_worker_answers_a_method_by_name():
    from vllm.v1.worker.worker_base import WorkerBase

    private.hand_out_traces()
    assert callable(getattr(WorkerBase, private.TRACE_METHOD))


def test_registering_twice_wraps_once():
    from vllm.lora.peft_helper import PEFTHelper

    from serving.engine.plugin import register

    register()
    once = PEFTHelper._init_is_supported
    register()
    assert PEFTHelper._init_is_supported is once


def test_serving_models_fill_the_response_s_model_through_model_name():
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    assert list(inspect.signature(OpenAIServingModels.model_name).parameters) == ["self", "lora_request"]
    source = inspect.getsource(OpenAIServingModels.__init__)
    assert "self.lora_requests" in source
    assert "self.lora_id_counter" in source


def test_the_prefix_cache_keys_on_an_adapter_s_name_and_path():
    """Why an engine name is never reused for other content."""
    from vllm.v1.core import kv_cache_utils

    request = SimpleNamespace(
        lora_request=SimpleNamespace(lora_name="reverse@1", lora_path="/store/1"), sampling_params=None
    )
    assert kv_cache_utils._gen_lora_extra_hash_keys(request) == [("lora", "reverse@1", "/store/1")]


def test_the_prefix_cache_keys_on_what_a_request_brings_along():
    from vllm.v1.core import kv_cache_utils

    def key(lora: object, arguments: dict[str, object]) -> object:
        request = SimpleNamespace(lora_request=lora, sampling_params=SimpleNamespace(extra_args=arguments))
        private.key_prefix_cache()
        return kv_cache_utils._gen_lora_extra_hash_keys(request)

    lora = SimpleNamespace(lora_name="composite", lora_path="/store/1")
    plain = key(lora, {})
    assert key(lora, {"other": 1}) == plain
    assert key(lora, {WEIGHTS: [0.5, 0.5]}) != plain
    assert key(lora, {WEIGHTS: [0.5, 0.5]}) == key(lora, {WEIGHTS: [0.5, 0.5]})
    assert key(lora, {WEIGHTS: [0.5, 0.5]}) != key(lora, {WEIGHTS: [0.4, 0.6]})
    assert key(lora, {TRACE: "one"}) != key(lora, {TRACE: "two"})
    assert key(lora, {WEIGHTS: object()}) != plain, "whatever it is, it must not end the engine"
    assert key(None, {WEIGHTS: [0.5, 0.5]}) == []
