"""The measurement behind `moerge bench kernel`: the gates' kernel beside vLLM's own, on the GPU that there is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from router.gating.gate import Table
from router.gating.layout import Layout, Member

#: A 7B Llama's groups of modules: name -> length of the input, widths of the outputs.
SHAPES = {
    "qkv": (4096, (4096, 4096, 4096)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (11008, 11008)),
    "down": (11008, (4096,)),
}
TOKENS = (1, 4, 16, 64, 256)
EXPERTS, RANK, SLOTS = 4, 64, 8


class Unavailable(Exception):
    """Why nothing can be measured here."""


def bench_kernel() -> list[dict[str, Any]]:
    """Microseconds of shrink + expand, of Arrow's gate between them, and of measuring x. Raises Unavailable."""
    if not torch.cuda.is_available():
        raise Unavailable("PyTorch finds no GPU.")
    from vllm.triton_utils import HAS_TRITON

    if not HAS_TRITON:
        raise Unavailable("vLLM finds no Triton driver.")
    return [
        {"module": name, "tokens": tokens, **measure(d_in, widths, tokens)}
        for name, (d_in, widths) in SHAPES.items()
        for tokens in TOKENS
    ]


def measure(d_in: int, widths: tuple[int, ...], tokens: int) -> dict[str, float]:
    """One group of modules, all tokens with the same Arrow composite of four experts of rank 16; bfloat16."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    from serving.engine.gpu_tables import Tables
    from serving.engine.kernels import gate_op, measure_op

    device, n = torch.device("cuda"), len(widths)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=device)

    x, y = random(tokens, d_in), random(tokens, sum(widths))
    A = tuple(random(SLOTS, 1, RANK, d_in) for _ in widths)
    B = tuple(random(SLOTS, 1, width, RANK) for width in widths)
    z = torch.zeros(n, tokens, RANK, device=device)
    meta = LoRAKernelMeta.make(SLOTS, tokens, device)
    meta.prepare_tensors(torch.zeros(tokens, dtype=torch.long, device=device))
    members = tuple(Member(id=str(k), rows=RANK // EXPERTS) for k in range(EXPERTS))
    layout = Layout(gate="arrow", settings={"top_k": 2}, members=members, form="unit")
    tables = Tables(SLOTS, [n], RANK, tokens, device)
    tables.fill(0, layout, {0: (range(n), Table(0, layout))})
    slots, constants = meta.token_lora_mapping[:tokens], tables.of(0)

    def lora() -> None:
        arguments = meta.meta_args(tokens, False)
        lora_shrink(x, A, z, *arguments, 1.0)
        lora_expand(z, B, y, *arguments, add_inputs=True)

    return {
        "lora_us": microseconds(lora),
        "gate_us": microseconds(lambda: gate_op(z, slots, tables.measures, tables.given, constants)),
        "measure_us": microseconds(lambda: measure_op(x, slots, tables.plan, tables.measures)),
    }


def microseconds(run: Callable[[], None], calls: int = 100) -> float:
    """Of one call inside a CUDA graph, where launches cost what they cost in serving."""
    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        graph.replay()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e6 / calls)
    return min(times)
