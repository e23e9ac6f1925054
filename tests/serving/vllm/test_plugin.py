"""The plugin's kernel against a loop, and every touch of vLLM's private API against what it expects.

When a new vLLM breaks one, the name of the failing test says which.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from serving.engine import private

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300)]

SLOTS, RANK, D_IN, WIDTHS = 5, 8, 24, (16, 8, 8)

WORKLOADS: dict[str, Callable[[int, torch.Generator], torch.Tensor]] = {
    "distinct": lambda n, g: torch.arange(n) % SLOTS,
    "uniform": lambda n, g: torch.randint(-1, SLOTS, (n,), generator=g),
    "zipf": lambda n, g: torch.multinomial(1 / torch.arange(1.0, SLOTS + 2), n, True, generator=g) - 1,
    "identical": lambda n, g: torch.full((n,), 3),
    "base only": lambda n, g: torch.full((n,), -1),
    "one request of the base model among many": lambda n, g: torch.where(torch.arange(n) == n // 2, -1, 4),
}


@pytest.fixture(scope="module")
def wrapper():
    from serving.engine.punica import SegmentPunicaWrapperCPU

    return SegmentPunicaWrapperCPU(512, 64, torch.device("cpu"), lora_config=SimpleNamespace(max_loras=SLOTS))


def set_slots(wrapper, index: torch.Tensor) -> None:
    """What `update_metadata` leaves behind after a step's mapping."""
    wrapper._token_lora_indices[: len(index)].copy_(index)
    wrapper.indices_len[0] = len(index)
    wrapper._segments = None


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_add_lora_linear_is_the_sum_token_by_token(wrapper, workload, tokens):
    g = torch.Generator().manual_seed(tokens)
    index = WORKLOADS[workload](tokens, g)
    set_slots(wrapper, index)
    x = torch.randn(tokens, D_IN, generator=g)
    a = tuple(torch.randn(SLOTS, 1, RANK, D_IN, generator=g) for _ in WIDTHS)
    b = tuple(torch.randn(SLOTS, 1, width, RANK, generator=g) for width in WIDTHS)
    y = torch.randn(tokens, sum(WIDTHS), generator=g)

    expected = y.clone()
    for t, slot in enumerate(index.tolist()):
        if slot >= 0:
            delta = [b_i[slot, 0] @ (a_i[slot, 0] @ x[t]) for a_i, b_i in zip(a, b, strict=True)]
            expected[t] += 0.5 * torch.cat(delta)
    wrapper.add_lora_linear(y, x, a, b, 0.5, WIDTHS)
    torch.testing.assert_close(y, expected)


def test_tokens_without_an_adapter_are_left_to_the_bit(wrapper):
    set_slots(wrapper, torch.tensor([-1, 0, -1]))
    x, y = torch.randn(3, D_IN), torch.randn(3, 16)
    before = y.clone()
    wrapper.add_lora_linear(y, x, (torch.randn(SLOTS, 1, RANK, D_IN),), (torch.randn(SLOTS, 1, 16, RANK),), 1.0, (16,))
    assert torch.equal(y[[0, 2]], before[[0, 2]])
    assert not torch.equal(y[1], before[1])


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


def test_stock_wrapper_takes_what_ours_overrides():
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    parameters = list(inspect.signature(PunicaWrapperCPU.add_lora_linear).parameters)
    expected = ["self", "y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices", "buffer", "kwargs"]
    assert parameters == expected
    assert isinstance(inspect.getattr_static(PunicaWrapperCPU, "token_lora_indices"), property)
    assert "mapping" in inspect.signature(PunicaWrapperCPU.update_metadata).parameters


def test_serving_models_fill_the_response_s_model_through_model_name():
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    assert list(inspect.signature(OpenAIServingModels.model_name).parameters) == ["self", "lora_request"]
    source = inspect.getsource(OpenAIServingModels.__init__)
    assert "self.lora_requests" in source
    assert "self.lora_id_counter" in source


def test_the_prefix_cache_keys_on_an_adapter_s_name_and_path():
    """Why an engine name is never reused for other content."""
    from vllm.v1.core import kv_cache_utils

    request = SimpleNamespace(lora_request=SimpleNamespace(lora_name="reverse@1", lora_path="/store/1"))
    assert kv_cache_utils._gen_lora_extra_hash_keys(request) == [("lora", "reverse@1", "/store/1")]
