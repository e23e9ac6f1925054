# mypy: disable-error-code="import-untyped, no-untyped-def, untyped-decorator"
"""Token-level gates on a GPU: one kernel between vLLM's shrink and its expand, and its slow twin in torch.

A CUDA graph replays the same launches at the same addresses whatever the batch holds. So nothing here branches on the
host: every token finds its gate through its slot, in tables that never move (`serving.engine.gpu_tables`), and where a
batch holds no composite each program reads two integers and ends.

Shapes: T tokens, n modules that share an input, R rank rows, K experts at most, S slots; z (n, T, R) float32.

    z'  = z - centre
    f_k = head_k z'[row_k]                              one row of a block: Arrow, PHATGOOSE, MeteoRA
    b_k = sqrt(sum over rows r of k of (body_r z'_r)^2)   the length of a block: SpectR, SMILE, LAG
    s_k = ((|f_k| or f_k or b_k) / measure - mean_k) rescale_k,                 rescale = 1 / (deviation temperature)
    g   = softmax over the top k of s, 0 for experts that do not adapt the module;     z_r <- g[expert of r] z_r

LAG chooses among the candidates with the largest |f|. Constant gates skip all that.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from vllm.utils.torch_utils import direct_register_custom_op

from router.gating.gate import TINY
from serving.engine import gpu_tables as layout

# What a Triton kernel may read of Python's numbers.
NONE, MAGNITUDE, SIGNED = tl.constexpr(layout.NONE), tl.constexpr(layout.MAGNITUDE), tl.constexpr(layout.SIGNED)
LENGTH, FILTERED, CONSTANT = tl.constexpr(layout.LENGTH), tl.constexpr(layout.FILTERED), tl.constexpr(layout.CONSTANT)
KIND, MEMBERS, TOP_K = tl.constexpr(layout.KIND), tl.constexpr(layout.MEMBERS), tl.constexpr(layout.TOP_K)
CANDIDATES, MEASURE = tl.constexpr(layout.CANDIDATES), tl.constexpr(layout.MEASURE)
SHARED, COLUMNS = tl.constexpr(layout.SHARED), tl.constexpr(layout.SHARED + 1)
MEASURES = tl.constexpr(2 * len(layout.DIVISORS))
LEAST = tl.constexpr(TINY)


@triton.jit
def _top(score, allowed, k, count):
    """(K,) which of the allowed are among the `count` highest; of equals, the first."""
    mine, other = score[None, :], score[:, None]
    above = ((other > mine) | ((other == mine) & (k[:, None] < k[None, :]))) & allowed[:, None]
    return allowed & (tl.sum(above.to(tl.int32), 0) < count)


@triton.jit
def _gate_kernel(
    z,
    slots,
    measures,
    given,
    plan,
    expert_of,
    row_of,
    default,
    present,
    centre,
    head,
    body,
    mean,
    rescale,
    n,
    T,
    R,
    K,
    N,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (t, i): token t in module i. With shared weights, program (t, 0) does all of t's modules."""
    t, i = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + t)
    if slot < 0:
        return
    plan += slot * COLUMNS
    kind, shared = tl.load(plan + KIND), tl.load(plan + SHARED)
    if (kind == NONE) | ((shared == 1) & (i > 0)):
        return
    start, end = tl.where(shared == 1, 0, i), tl.where(shared == 1, n, i + 1)
    k, r = tl.arange(0, EXPERTS), tl.arange(0, ROWS)
    member, inside = k < tl.load(plan + MEMBERS), r < R
    expert = tl.load(expert_of + slot * R + r, mask=inside, other=-1)
    mine = expert[None, :] == k[:, None]  # (K, R)
    weight = tl.load(given + t * K + k, mask=member, other=0.0)
    weight = tl.where(weight == weight, weight, tl.load(default + slot * K + k, mask=member, other=0.0))
    score, first = tl.zeros((EXPERTS,), tl.float32), tl.zeros((EXPERTS,), tl.float32)

    if kind != CONSTANT:  # the mean over the modules that an expert adapts; of one module, the score itself
        count = tl.zeros((EXPERTS,), tl.float32)
        row = tl.load(row_of + slot * K + k, mask=member, other=0)
        measure = tl.load(measures + t * MEASURES + tl.load(plan + MEASURE))
        for j in range(start, end):
            z_j, place = z + (j * T + t) * R, slot * N + j
            f = tl.load(z_j + row, mask=member, other=0.0) - tl.load(centre + place * R + row, mask=member, other=0.0)
            f *= tl.load(head + place * K + k, mask=member, other=0.0)
            s = tl.where(kind == SIGNED, f, tl.abs(f))
            if (kind == LENGTH) | (kind == FILTERED):
                rows = tl.load(z_j + r, mask=inside, other=0.0)
                rows -= tl.load(centre + place * R + r, mask=inside, other=0.0)
                rows *= tl.load(body + place * R + r, mask=inside, other=0.0)
                s = tl.sqrt(tl.sum(tl.where(mine, (rows * rows)[None, :], 0.0), 1))
            s = s / measure - tl.load(mean + place * K + k, mask=member, other=0.0)
            s *= tl.load(rescale + place * K + k, mask=member, other=0.0)
            here = tl.load(present + place * K + k, mask=member, other=0.0)
            score, first, count = score + here * s, first + here * tl.abs(f), count + here
        score, first = score / tl.maximum(count, 1.0), first / tl.maximum(count, 1.0)

    for j in range(start, end):
        z_j, place = z + (j * T + t) * R, slot * N + j
        if kind != CONSTANT:
            kept = member & (tl.load(present + place * K + k, mask=member, other=0.0) > 0)
            if kind == FILTERED:
                kept = _top(first, kept, k, tl.load(plan + CANDIDATES))
            kept = _top(score, kept, k, tl.load(plan + TOP_K))
            best = tl.max(tl.where(kept, score, float("-inf")), 0)
            weight = tl.where(kept, tl.exp(score - best), 0.0)
            weight /= tl.maximum(tl.sum(weight, 0), LEAST)
        rows = tl.load(z_j + r, mask=inside, other=0.0)
        rows *= tl.sum(tl.where(mine, weight[:, None], 0.0), 0)
        tl.store(z_j + r, rows, mask=inside & (expert >= 0))


@triton.jit
def _measure_kernel(x, slots, plan, measures, d, stride, CHUNK: tl.constexpr):
    """Program t: length, root mean square and standard deviation of x[t], where its gate asks for one."""
    t = tl.program_id(0)
    slot = tl.load(slots + t)
    if slot < 0:
        return
    if tl.load(plan + slot * COLUMNS + MEASURE) == 0:
        return
    x += t * stride
    o = tl.arange(0, CHUNK)
    sums, squares = tl.zeros((CHUNK,), tl.float32), tl.zeros((CHUNK,), tl.float32)
    spreads = tl.zeros((CHUNK,), tl.float32)
    for c in range(0, d, CHUNK):
        part = tl.load(x + c + o, mask=c + o < d, other=0.0).to(tl.float32)
        sums += part
        squares += part * part
    mean, square = tl.sum(sums, 0) / d, tl.sum(squares, 0)
    for c in range(0, d, CHUNK):  # x again: no cancellation
        part = tl.load(x + c + o, mask=c + o < d, other=0.0).to(tl.float32) - mean
        spreads += tl.where(c + o < d, part * part, 0.0)
    length, rms = tl.maximum(tl.sqrt(square), LEAST), tl.maximum(tl.sqrt(square / d), LEAST)
    spread = tl.maximum(tl.sqrt(tl.sum(spreads, 0) / d), LEAST)
    measures += t * MEASURES
    tl.store(measures + 1, length)
    tl.store(measures + 2, rms)
    tl.store(measures + 3, spread)
    tl.store(measures + 4, spread * length)
    tl.store(measures + 5, spread * rms)


def gate_by_kernel(z: Tensor, slots: Tensor, measures: Tensor, given: Tensor, tables: Sequence[Tensor]) -> None:
    n, T, R = z.shape
    N, K = tables[4].shape[1:]  # of present (S, N, K)
    experts, rows = triton.next_power_of_2(K), triton.next_power_of_2(R)
    warps = min(8, max(1, experts * rows // 512))
    _gate_kernel[(T, n)](z, slots, measures, given, *tables, n, T, R, K, N, EXPERTS=experts, ROWS=rows, num_warps=warps)


def measure_by_kernel(x: Tensor, slots: Tensor, plan: Tensor, measures: Tensor) -> None:
    T, d = x.shape
    _measure_kernel[(T,)](x, slots, plan, measures, d, x.stride(0), CHUNK=1024)


# -------------------------------------------------------------------------------------------------------- slow twins


def gate_by_torch(z: Tensor, slots: Tensor, measures: Tensor, given: Tensor, tables: Sequence[Tensor]) -> None:
    """The same without a branch: every token computes every kind of score."""
    plan, expert, row, default, *places = tables
    s, n, K = slots.clamp_min(0).long(), z.shape[0], row.shape[1]
    kind, members, top_k, candidates, measure, shared = plan[s].unbind(-1)  # (T,) each
    present, centre, head, body, mean, rescale = (each[s][:, :n].transpose(0, 1) for each in places)  # (n, T, K or R)
    k = torch.arange(K, device=z.device)
    here = (present > 0) & (k < members[:, None])
    mine = (expert[s].unsqueeze(-1) == k).to(z)  # (T, R, K)

    centred = z - centre
    first = centred.gather(2, row[s].long().expand(n, -1, -1)) * head
    length = torch.einsum("ntr,trk->ntk", (centred * body) ** 2, mine).sqrt()
    of_kind = kind[:, None]
    score = torch.where(of_kind >= layout.LENGTH, length, torch.where(of_kind == layout.SIGNED, first, first.abs()))
    score = (score / measures[: len(s)].gather(1, measure[:, None].long()) - mean) * rescale

    def over_modules(scores: Tensor) -> Tensor:
        mean = torch.where(here, scores, 0).sum(0, keepdim=True) / here.sum(0, keepdim=True).clamp_min(1)
        return torch.where(shared[:, None] == 1, mean, scores)

    score, first = over_modules(score), over_modules(first.abs())
    kept = here & (_rank(first, here) < torch.where(kind == layout.FILTERED, candidates, K)[:, None])
    kept = kept & (_rank(score, kept) < top_k[:, None])
    weight = torch.softmax(score.masked_fill(~kept, float("-inf")), -1).masked_fill(~kept, 0)
    constant = torch.where(given[: len(s)].isnan(), default[s], given[: len(s)])
    weight = torch.where(of_kind == layout.CONSTANT, constant, weight)
    factor = torch.einsum("ntk,trk->ntr", weight, mine)
    touched = ((slots >= 0) & (kind != layout.NONE))[:, None] & (expert[s] >= 0)  # (T, R)
    z.copy_(torch.where(touched, z * factor, z))


def _rank(scores: Tensor, allowed: Tensor) -> Tensor:
    """(..., K) how many allowed experts are before each: higher score, or as high and earlier."""
    order = scores.masked_fill(~allowed, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    return order.argsort(-1)


def measure_by_torch(x: Tensor, slots: Tensor, plan: Tensor, measures: Tensor) -> None:
    x = x.float()
    length = x.norm(dim=-1).clamp_min(TINY)
    rms = (x.square().mean(-1)).sqrt().clamp_min(TINY)
    spread = x.std(-1, correction=0).clamp_min(TINY)
    measures[: len(x), 1:] = torch.stack([length, rms, spread, spread * length, spread * rms], -1)


# ------------------------------------------------------------------------------------------------------- custom ops


def _compiled(tensor: Tensor) -> bool:
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def gate(z: Tensor, slots: Tensor, measures: Tensor, given: Tensor, tables: list[Tensor]) -> None:
    """Multiply the blocks of z (n, T, R) by their weights, in place."""
    (gate_by_kernel if _compiled(z) else gate_by_torch)(z, slots, measures, given, tables)


def measure(x: Tensor, slots: Tensor, plan: Tensor, measures: Tensor) -> None:
    """Write to `measures` what the gates of these tokens divide by, of x (T, d)."""
    (measure_by_kernel if _compiled(x) else measure_by_torch)(x, slots, plan, measures)


def _changes_its_argument(*_: Any) -> None:
    """What torch.compile is told of an operation without a result."""


direct_register_custom_op("moerge_gate", gate, mutates_args=["z"], fake_impl=_changes_its_argument)
direct_register_custom_op("moerge_measure", measure, mutates_args=["measures"], fake_impl=_changes_its_argument)
gate_op: Any = torch.ops.vllm.moerge_gate
measure_op: Any = torch.ops.vllm.moerge_measure
