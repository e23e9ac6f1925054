"""The GPU's gate: Triton's kernel (in its interpreter) against its twin in torch, and the twin against the gates."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from router.gating import GATES, gate_of
from router.gating.gate import Step, Table
from router.gating.layout import Layout, Member
from serving.engine.gpu_tables import KINDS, NotOnGpu, Tables, refuse

pytestmark = pytest.mark.timeout(200)

SIZES, RANK, D = (3, 1, 2), 48, 40
#: gate, settings, rows of the members' blocks
COMPOSITES = [
    ("arrow", {}, (16, 16, 16)),
    ("arrow", {"top_k": 2, "temperature": 0.3}, (4, 16, 8)),
    ("arrow", {"top_k": 2, "normalise": "zscore", "shared": True}, (8, 8, 8)),
    ("arrow", {"top_k": 3, "centred": True}, (5, 5, 5, 5)),
    ("spectr", {"normalise": "rms"}, (8, 8, 8)),
    ("spectr", {"singular_values": False, "top_k": 1}, (1, 8, 16)),
    ("smile", {"k_gate": 3, "normalise": "unit", "shared": True}, (8, 2, 8)),
    ("lag", {"top_k": 2}, (8, 8, 8)),
    ("lag", {"top_k": 3, "normalise": "zscore"}, (4, 8, 12, 4)),
    ("lag", {"top_k": 2, "shared": True, "centred": True, "singular_values": False}, (8, 8, 8)),
    ("phatgoose", {}, (12, 12, 12)),
    ("phatgoose", {"top_k": 3, "normalise": "unit"}, (4, 8, 16)),
    ("meteora", {"shared": True}, (8, 16)),
    ("constant", {}, (8, 8, 8)),
    ("constant", {"weights": [0.7, -0.2, 0.5]}, (2, 8, 16)),
]


def layout_of(gate: str, settings: dict, blocks: tuple[int, ...]) -> Layout:
    members = tuple(Member(id=f"expert-{k}", rows=rows) for k, rows in enumerate(blocks))
    layout = Layout(gate=gate, settings=settings, members=members, extra=len(blocks) * GATES[gate].extra)
    return layout.model_copy(update={"form": gate_of(layout).form})


def tables_of(layout: Layout, g: torch.Generator, all_present: bool) -> list[Table]:
    """Random constants for every group of modules; every expert adapts at least one module of a group."""
    K, tables = len(layout.members), []
    for index, n in enumerate(SIZES):
        present = torch.rand(n, K, generator=g) < 0.7
        present[0] = True
        constants = {
            "scale": torch.rand(n, layout.rank, generator=g) + 0.5,
            "mean": torch.randn(n, K, generator=g),
            "deviation": torch.rand(n, K, generator=g) + 0.5,
            "centre": torch.randn(n, layout.rank, generator=g),
        }
        tables.append(Table(index, layout, present=None if all_present else present, **constants))
    return tables


def places(tables: list[Table]) -> dict[int, tuple[range, Table]]:
    """Every group adapted, with all its modules."""
    return {table.index: (range(SIZES[table.index]), table) for table in tables}


def case(seed: int, tokens: int = 13) -> tuple[Tables, list[tuple[Layout, list[Table]]], torch.Tensor, torch.Tensor]:
    """All composites in slots of their own, one slot without; tokens spread over the slots and -1."""
    g = torch.Generator().manual_seed(seed)
    layouts = [layout_of(*each) for each in COMPOSITES]
    slots = len(layouts) + 1
    tables = Tables(slots, SIZES, RANK, tokens, "cpu")
    filled = [(layout, tables_of(layout, g, all_present=seed % 2 == 0)) for layout in layouts]
    for slot, (layout, constants) in enumerate(filled):
        tables.fill(slot, layout, places(constants))
    token_slots = torch.randint(-1, slots, (tokens,), generator=g, dtype=torch.int32)
    x = torch.randn(tokens, D, generator=g) + 0.5
    tables.given[::2, :2] = torch.rand(len(tables.given[::2]), 2, generator=g)
    return tables, filled, token_slots, x


@pytest.mark.parametrize("seed", range(4))
def test_the_twin_does_to_every_token_what_its_gate_does(seed):
    from serving.engine.kernels import gate_op, measure_op

    tables, filled, _, x = case(seed)
    for slot, (layout, constants) in enumerate(filled):
        slots = torch.full((len(x),), slot, dtype=torch.int32)
        measure_op(x, slots, tables.plan, tables.measures)
        gate, K = gate_of(layout), len(layout.members)
        step = Step(
            length=x.norm(dim=-1)[:, None, None],
            spread=x.std(-1, correction=0)[:, None, None],
            given=tables.given[:, :K],
            d_in=D,
        )
        for table, n in zip(constants, SIZES, strict=True):
            z = torch.randn(n, len(x), RANK, generator=torch.Generator().manual_seed(seed))
            expected = z[..., : layout.rank].transpose(0, 1).clone()  # (t, n, R)
            gate(expected, table, step)
            gate_op(z, slots, tables.measures, tables.given, tables.of(table.index))
            total = sum(layout.blocks)
            torch.testing.assert_close(z[..., :total].transpose(0, 1), expected[..., :total], msg=str(layout))


def test_tokens_without_a_composite_keep_their_buffer_to_the_bit():
    from serving.engine.kernels import gate_op

    tables, _, _, x = case(0)
    tables.clear(3)
    for slot in (-1, 3, len(COMPOSITES)):  # no adapter; what a composite has left behind; a plain adapter
        z = torch.randn(3, len(x), RANK)
        before = z.clone()
        gate_op(z, torch.full((len(x),), slot, dtype=torch.int32), tables.measures, tables.given, tables.of(0))
        assert torch.equal(z, before)


def test_a_mixed_step_equals_its_tokens_alone():
    from serving.engine.kernels import gate_op, measure_op

    tables, _, slots, x = case(5)
    z = torch.randn(3, len(x), RANK)
    alone = z.clone()
    measure_op(x, slots, tables.plan, tables.measures)
    gate_op(z, slots, tables.measures, tables.given, tables.of(0))
    for t in range(len(x)):
        part = alone[:, t : t + 1].clone()
        gate_op(part, slots[t : t + 1], tables.measures[t : t + 1], tables.given[t : t + 1], tables.of(0))
        torch.testing.assert_close(z[:, t : t + 1], part)


def test_refilling_a_slot_leaves_nothing_of_its_last_composite():
    tables, filled, _, _ = case(1)
    fresh = Tables(1, SIZES, RANK, 1, "cpu")
    layout, constants = filled[0]
    fresh.fill(0, layout, places(constants))
    for each, other in filled:
        tables.fill(0, each, places(other))
    tables.fill(0, layout, places(constants))
    K = len(layout.members)
    for name in ("plan", "expert"):
        assert torch.equal(getattr(tables, name)[0], getattr(fresh, name)[0]), name
    for index, n in enumerate(SIZES):
        for name in ("present", "centre", "head", "body", "mean", "rescale"):
            mine, other = getattr(tables, name)[index, 0, :n, :K], getattr(fresh, name)[index, 0, :n, :K]
            assert torch.equal(mine, other), name


@pytest.mark.parametrize("gate", sorted(set(GATES) - set(KINDS)))
def test_gates_with_state_are_refused_with_those_that_work(gate):
    layout = layout_of(gate, {}, (4, 4))
    with pytest.raises(NotOnGpu, match=rf"Gate '{gate}' is served on CPUs only\. On GPUs: arrow, .*constant"):
        Tables(2, SIZES, RANK, 4, "cpu").fill(0, layout, {})


def test_measures_of_a_split_input_are_refused():
    refuse(layout_of("arrow", {}, (4, 4)), tensor_parallel=2)
    for gate, settings in (("phatgoose", {}), ("arrow", {"normalise": "rms"})):
        with pytest.raises(NotOnGpu, match="each of the 2 GPUs may hold a part"):
            refuse(layout_of(gate, settings, (4, 4)), tensor_parallel=2)


def test_too_many_experts_are_refused():
    with pytest.raises(NotOnGpu, match="composite of 33 experts; on GPUs at most 32"):
        refuse(layout_of("arrow", {}, (1,) * 33))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_graph_follows_what_its_slots_hold():
    from serving.engine.kernels import gate_by_torch, gate_op

    tables, filled, slots, x = case(2)
    on_gpu = Tables(len(COMPOSITES) + 1, SIZES, RANK, len(x), "cuda")
    for slot, (layout, constants) in enumerate(filled):
        on_gpu.fill(slot, layout, places(constants))
    on_gpu.given.copy_(tables.given)
    z, before = torch.empty(3, len(x), RANK, device="cuda"), torch.randn(3, len(x), RANK)
    token_slots = slots.cuda()
    gate_op(z, token_slots, on_gpu.measures, on_gpu.given, on_gpu.of(0))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gate_op(z, token_slots, on_gpu.measures, on_gpu.given, on_gpu.of(0))
    for rotated in range(3):  # other composites in the slots, the same graph
        for slot, (layout, constants) in enumerate(filled[rotated:] + filled[:rotated]):
            tables.fill(slot, layout, places(constants))
            on_gpu.fill(slot, layout, places(constants))
        expected = before.clone()
        gate_by_torch(expected, slots, tables.measures, tables.given, tables.of(0))
        z.copy_(before)
        graph.replay()
        torch.testing.assert_close(z.cpu(), expected)


def compare_in_the_interpreter() -> None:
    """Kernel and twin on the same inputs; run in a process of its own, since Triton reads its variable on import."""
    from serving.engine import kernels

    for seed in range(2):
        tables, _, slots, x = case(seed, tokens=2 * len(COMPOSITES))
        slots[: len(COMPOSITES)] = torch.arange(len(COMPOSITES))  # every composite occurs
        asks = (slots >= 0) & (tables.plan[slots.clamp_min(0)][:, kernels.MEASURE.value] > 0)
        by_kernel, by_torch = tables.measures.clone(), tables.measures.clone()
        kernels.measure_by_kernel(x, slots, tables.plan, by_kernel)
        kernels.measure_by_torch(x, slots, tables.plan, by_torch)
        torch.testing.assert_close(by_kernel[asks], by_torch[asks])
        assert (by_kernel[~asks] == 1).all()
        for group, n in enumerate(SIZES):
            z = torch.randn(n, len(x), RANK, generator=torch.Generator().manual_seed(seed))
            expected = z.clone()
            kernels.gate_by_kernel(z, slots, by_torch, tables.given, tables.of(group))
            kernels.gate_by_torch(expected, slots, by_torch, tables.given, tables.of(group))
            torch.testing.assert_close(z, expected)
    print("equal")


def compile_for_gpus() -> None:
    """To machine code for an A100 and an H100, which needs no GPU: Triton's types and shapes hold up."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from serving.engine import kernels

    integers = ("slots", "plan", "expert_of", "row_of")
    for kernel, sizes in (
        (kernels._gate_kernel, {"EXPERTS": 32, "ROWS": 64}),
        (kernels._gate_kernel, {"EXPERTS": 32, "ROWS": 512}),
        (kernels._measure_kernel, {"CHUNK": 1024}),
    ):
        signature = dict.fromkeys(kernel.arg_names, "*fp32") | {"x": "*bf16"} | dict.fromkeys(integers, "*i32")
        signature |= dict.fromkeys(("n", "T", "R", "K", "N", "d", "stride"), "i32") | dict.fromkeys(sizes, "constexpr")
        source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, sizes)
        for capability in (80, 90):
            assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
    print("compiled")


def in_a_process(function: str, **environment: str) -> str:
    """Run one of this file's functions where Triton has not been imported yet; what it printed last."""
    ran = subprocess.run(
        [sys.executable, __file__, function], env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return ran.stdout.strip().splitlines()[-1]


def test_the_kernel_does_what_its_twin_does():
    assert in_a_process("compare_in_the_interpreter", TRITON_INTERPRET="1") == "equal"


def assemblers() -> list[Path]:
    """NVIDIA's assemblers, which Triton's wheels bring along; it is not imported here."""
    spec = find_spec("triton")
    folders = spec.submodule_search_locations if spec else None
    return [path for folder in folders or () for path in Path(folder).glob("backends/nvidia/bin/ptxas*")]


@pytest.mark.skipif(not assemblers(), reason="this build of Triton brings no assembler for NVIDIA's GPUs")
def test_the_kernels_compile_for_gpus(tmp_path):
    assert in_a_process("compile_for_gpus", TRITON_CACHE_DIR=str(tmp_path)) == "compiled"


if __name__ == "__main__":
    globals()[sys.argv[1]]()
