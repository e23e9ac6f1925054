"""The GPU's wrapper around a shrink and an expand in torch: what it gates, which tokens, whose weights."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

from router.gating import gate_of
from router.gating.gate import Step, Table
from router.gating.layout import Layout, Member
from serving.engine.batch import WEIGHTS, Batch, Request
from serving.engine.slots import Group, slot_adapter

pytestmark = pytest.mark.timeout(200)

SLOTS, RANK, D, WIDTHS = 4, 24, 32, (16, 8, 8)
MODULES = ("q", "k", "v")


@pytest.fixture(scope="module")
def wrapper_class():
    from serving.engine.punica_gpu import GatedMixin

    class TorchWrapper:
        """vLLM's GPU wrapper with its two kernels written out."""

        def __init__(self) -> None:
            self.device = torch.device("cpu")
            self.lora_config = SimpleNamespace(max_loras=SLOTS, max_lora_rank=RANK)
            self._token_lora_indices = torch.full((64,), -1)
            self.token_mapping_meta = SimpleNamespace(token_lora_mapping=torch.full((64,), -1, dtype=torch.int32))

        def set_tokens(self, slots: torch.Tensor) -> None:
            self._token_lora_indices[: len(slots)] = slots
            self.token_mapping_meta.token_lora_mapping[: len(slots)] = slots.int()

        def add_shrink(self, y, x, lora_a_stacked, scale, **kwargs):
            s = self.token_mapping_meta.token_lora_mapping[: len(x)]
            for y_i, A in zip(y, lora_a_stacked, strict=True):
                y_i.copy_(torch.einsum("td,trd->tr", x, A[s.clamp_min(0).long(), 0]) * scale)

        def add_expand(self, y, x, lora_b_stacked, output_slices, offset_start=0, add_inputs=True, **kwargs):
            s = self.token_mapping_meta.token_lora_mapping[: len(y)]
            for x_i, B, width in zip(x, lora_b_stacked, output_slices, strict=True):
                delta = torch.einsum("tr,tdr->td", x_i, B[s.clamp_min(0).long(), 0]) * (s >= 0)[:, None]
                y[:, offset_start : offset_start + width] += delta
                offset_start += width

        def add_lora_linear(self, y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **kwargs):
            z = torch.empty(len(output_slices), len(x), RANK)
            self.add_shrink(z, x, lora_a_stacked, scale)
            self.add_expand(y, z, lora_b_stacked, output_slices)

    return type("Gated", (GatedMixin, TorchWrapper), {})


def layout_of(gate: str, settings: dict, extra: int = 0) -> Layout:
    members = tuple(Member(id=f"expert-{k}", rows=rows) for k, rows in enumerate((8, 4, 8)))
    return Layout(gate=gate, settings=settings, members=members, extra=extra)


@pytest.fixture
def world(wrapper_class):
    """Arrow in slot 0, PHATGOOSE in 1, constant weights in 2, a plain adapter in 3; two groups of modules."""
    g = torch.Generator().manual_seed(0)
    groups = [
        Group(index, f"layer.{index}", MODULES, D, WIDTHS, *(tuple(t) for t in stacked))
        for index, stacked in enumerate(
            (
                [torch.randn(SLOTS, 1, RANK, D, generator=g) for _ in MODULES],
                [torch.randn(SLOTS, 1, width, RANK, generator=g) for width in WIDTHS],
            )
            for _ in range(2)
        )
    ]
    wrapper = wrapper_class()
    wrapper.set_groups(groups)
    layouts = [layout_of("arrow", {"top_k": 2}), layout_of("phatgoose", {}, extra=3), layout_of("constant", {}), None]
    for slot, layout in enumerate(layouts):
        ranks = dict.fromkeys(MODULES, layout.rank if layout else 8)
        wrapper.set_slot(slot, slot_adapter(groups, ranks, layout, {}))
    return SimpleNamespace(wrapper=wrapper, groups=groups, layouts=layouts)


def written_out(world, group: Group, x, slots, given=None):
    """`y[t] = B gate(A x[t])`, token by token."""
    y = torch.zeros(len(x), sum(WIDTHS))
    for t, slot in enumerate(slots.tolist()):
        if slot < 0:
            continue
        z = torch.stack([A[slot, 0] @ x[t] for A in group.A])[None]  # (1, n, R)
        if (layout := world.layouts[slot]) is not None:
            spread = x[t].std(correction=0).reshape(1, 1, 1)
            step = Step(spread=spread, given=None if given is None else given[t : t + 1])
            gate_of(layout)(z[..., : layout.rank], Table(group.index, layout), step)
        y[t] = torch.cat([B[slot, 0] @ z_i for B, z_i in zip(group.B, z[0], strict=True)])
    return y


def run(world, index, x):
    group = world.groups[index]
    y = torch.zeros(len(x), sum(WIDTHS))
    world.wrapper.at(index).add_lora_linear(y, x, group.A, group.B, 1.0, WIDTHS)
    return y


def test_a_mixed_step_is_the_sum_token_by_token(world):
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(1))
    slots = torch.arange(20) % 5 - 1
    world.wrapper.set_tokens(slots)
    for index, group in enumerate(world.groups):
        torch.testing.assert_close(run(world, index, x), written_out(world, group, x, slots), rtol=1e-4, atol=1e-4)


def test_requests_bring_weights_for_one_step(world):
    x = torch.randn(6, D, generator=torch.Generator().manual_seed(2))
    slots = torch.tensor([2, 2, 0, 2, 3, 2])
    world.wrapper.set_tokens(slots)
    requests = (
        Request("a", 2, 2, 0, torch.zeros(1).numpy(), {WEIGHTS: [1.0, 0.0, -0.5]}),
        Request("b", 0, 1, 0, torch.zeros(1).numpy()),
        Request("c", 2, 2, 0, torch.zeros(1).numpy()),
    )
    given = torch.full((6, 3), float("nan"))
    given[:2] = torch.tensor([1.0, 0.0, -0.5])
    world.wrapper.set_step(Batch(requests))
    expected = written_out(world, world.groups[0], x, slots, given)
    torch.testing.assert_close(run(world, 0, x), expected, rtol=1e-4, atol=1e-4)
    world.wrapper.set_step(Batch(requests[1:]))
    expected = written_out(world, world.groups[0], x, slots)
    torch.testing.assert_close(run(world, 0, x), expected, rtol=1e-4, atol=1e-4)


def test_a_plain_adapter_in_a_composite_s_slot_is_not_gated(world):
    x, slots = torch.randn(3, D), torch.zeros(3, dtype=torch.long)
    world.wrapper.set_tokens(slots)
    world.wrapper.set_slot(0, slot_adapter(world.groups, dict.fromkeys(MODULES, RANK)))
    world.layouts[0] = None
    torch.testing.assert_close(run(world, 0, x), written_out(world, world.groups[0], x, slots), rtol=1e-4, atol=1e-4)


def test_a_composite_that_no_gpu_can_gate_leaves_the_slot_ungated(world):
    from serving.engine.gpu_tables import NotOnGpu

    layout = layout_of("evidence", {})
    with pytest.raises(NotOnGpu, match="served on CPUs only"):
        world.wrapper.set_slot(1, slot_adapter(world.groups, dict.fromkeys(MODULES, layout.rank), layout, {}))
    assert world.wrapper.tables.plan[1].tolist() == [0] * 6


def test_torch_compile_traces_it_without_a_break_and_refilled_slots_need_no_new_trace(world):
    layers = [world.wrapper.at(index) for index in range(2)]
    slots = torch.arange(10) % 5 - 1
    world.wrapper.set_tokens(slots)
    traced = 0

    def backend(graph, inputs):
        nonlocal traced
        traced += 1
        return graph.forward

    @torch.compile(fullgraph=True, backend=backend)
    def model(x):
        y = torch.zeros(len(x), sum(WIDTHS))
        for layer, group in zip(layers, world.groups, strict=True):
            layer.add_lora_linear(y, x, group.A, group.B, 1.0, WIDTHS)
        return y

    x = torch.randn(10, D, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        for swapped in (False, True):
            if swapped:  # what was plain is gated now, and the other way round
                world.layouts[0], world.layouts[3] = None, layout_of("spectr", {"top_k": 1})
                for slot in (0, 3):
                    layout = world.layouts[slot]
                    ranks = dict.fromkeys(MODULES, layout.rank if layout else RANK)
                    world.wrapper.set_slot(slot, slot_adapter(world.groups, ranks, layout, {}))
            expected = sum(written_out(world, group, x, slots) for group in world.groups)
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert traced == 1


def test_vllm_s_wrapper_has_what_ours_relies_on():
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    from serving.engine.punica_gpu import GatedPunicaWrapperGPU

    for name in ("add_shrink", "add_expand"):
        theirs, ours = (inspect.signature(getattr(each, name)) for each in (PunicaWrapperGPU, GatedPunicaWrapperGPU))
        assert list(theirs.parameters) == list(ours.parameters), name
    assert "token_lora_mapping" in LoRAKernelMeta.__dataclass_fields__
    source = inspect.getsource(PunicaWrapperGPU.add_lora_linear)
    assert "self.add_shrink(" in source
    assert "self.add_expand(" in source
    assert "dtype=torch.float32" in source
