"""Building a composite's folder: one SVD for each expert and module, in threads, written as they come."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from adapters_registry.lora import CONFIG, WEIGHTS
from router.composite.parallel import in_threads
from router.composite.part import stored_tensor
from router.composite.planning import Plan, changes
from router.composite.statistics import scorer_of, tables_of
from router.gating.arrow import Arrow
from router.gating.lag import LAG
from router.gating.layout import KEY, MARK, TABLES, Layout
from router.lowrank import SVD, svd
from router.tensorfile import write_tensors

ALIKE = 1.1  # sigma_1 / sigma_2 under which the first singular direction is hardly defined


@dataclass(frozen=True, eq=False)
class Block:
    """One expert in one module. `sharp` is sigma_1 / sigma_2; `lost` and `total` are squared Frobenius norms."""

    sharp: float
    lost: float
    total: float


@dataclass(frozen=True, eq=False)
class Stacked:
    """One module of a composite: A (R, d_in), B (d_out, R), the gate's tables, and its blocks (None: absent)."""

    A: Tensor
    B: Tensor
    tables: dict[str, Tensor]
    blocks: list[Block | None]


def build(folder: Path, plan: Plan) -> Layout:
    folder.mkdir(parents=True, exist_ok=True)
    R = plan.layout.rank
    shapes = {}
    for module, (d_out, d_in) in plan.modules.items():
        shapes[_tensor(module, "A")] = (R, d_in)
        shapes[_tensor(module, "B")] = (d_out, R)
    tables: dict[str, Tensor] = {"format": torch.tensor(plan.layout.format)}
    blocks: dict[str, list[Block | None]] = {}

    def stacked() -> Iterator[Tensor]:
        for module, done in zip(plan.modules, in_threads(partial(stack_module, plan), plan.modules), strict=True):
            tables.update({f"{module}.{table}": tensor for table, tensor in done.tables.items()})
            blocks[module] = done.blocks
            yield done.A
            yield done.B

    write_tensors(folder / WEIGHTS, shapes, stacked())
    save_file(tables, folder / TABLES)
    layout = plan.layout.model_copy(update={"notes": tuple(_notes(plan, list(blocks.values())))})
    (folder / CONFIG).write_text(json.dumps(_config(plan, layout), indent=2) + "\n", encoding="utf-8")
    return layout


def stack_module(plan: Plan, module: str) -> Stacked:
    """One module of every expert, in float64 from the factors on and in float32 at the end."""
    layout, (d_out, d_in) = plan.layout, plan.modules[module]
    K, R = len(layout.members), layout.rank
    A, B, scale = torch.zeros(R, d_in), torch.zeros(d_out, R), torch.ones(R)
    blocks: list[Block | None] = []
    for adapter, start, rows in zip(plan.adapters, layout.starts, layout.blocks, strict=True):
        factors = changes(adapter, plan.general, module)
        if factors is None or not (spectrum := svd(factors)).S.any():
            blocks.append(None)
            continue
        r = min(rows, len(spectrum.S))
        U, S, Vt = spectrum.U[:, :r], spectrum.S[:r], spectrum.Vt[:r]
        unit = layout.form == "unit"
        A[start : start + r] = Vt if unit else S[:, None] * Vt
        B[:, start : start + r] = U * S if unit else U
        scale[start : start + r] = torch.where(S > 0, S, 1.0)
        blocks.append(_block(spectrum, r))
    tables = _statistics(plan, module, blocks)
    if plan.gate.extra:
        for k in range(K):
            if blocks[k] is not None:
                vector = stored_tensor(plan.parts[k].tensors[layout.gate][module]).double()
                A[R - K + k] = plan.gate.row(vector).float()
    if plan.gate.needs_scale:
        tables["scale"] = scale
    if None in blocks:
        tables["present"] = torch.tensor([block is not None for block in blocks])
    return Stacked(A, B, tables, blocks)


def _block(spectrum: SVD, kept: int) -> Block:
    S = spectrum.S.double()
    sharp = float(S[0] / S[1]) if len(S) > 1 and S[1] > 0 else float("inf")
    return Block(sharp, float(S[kept:].square().sum()), float(S.square().sum()))


def _statistics(plan: Plan, module: str, blocks: list[Block | None]) -> dict[str, Tensor]:
    """mean, deviation (K,) and centre (R,), as far as the gate needs them; 0, 1 and 0 for absent experts."""
    wanted = tables_of(plan.gate)
    if plan.key is None or not wanted:
        return {}
    layout = plan.layout
    K = len(layout.members)
    found = {"mean": torch.zeros(K), "deviation": torch.ones(K), "centre": torch.zeros(layout.rank)}
    for k, (part, start, rows) in enumerate(zip(plan.parts, layout.starts, layout.blocks, strict=True)):
        if blocks[k] is None:
            continue
        stored = part.tensors[plan.key]
        if "mean" in wanted:
            found["mean"][k] = stored_tensor(stored[f"{module}.mean"])
            deviation = stored_tensor(stored[f"{module}.deviation"])
            found["deviation"][k] = deviation if deviation > 0 else 1.0
        if "centre" in wanted:
            found["centre"][start : start + rows] = stored_tensor(stored[f"{module}.centre"])
    return {table: found[table] for table in wanted}


def _notes(plan: Plan, modules: list[list[Block | None]]) -> Iterator[str]:
    """What a person should know about the members."""
    scorer = scorer_of(plan.gate)
    for k, member in enumerate(plan.layout.members):
        mine = [block for blocks in modules if (block := blocks[k]) is not None]
        if not mine:
            yield f"'{member.id}' changes nothing: all its products B A are zero."
            continue
        alike = sum(block.sharp < ALIKE for block in mine)
        if isinstance(scorer, (Arrow, LAG)) and alike * 4 >= len(mine):
            yield (
                f"'{member.id}' has sigma_1 / sigma_2 under {ALIKE} in {alike} of {len(mine)} modules: its first "
                "singular direction is hardly defined there, so that Arrow's scores say little."
            )
        if plan.compressed and (lost := sum(block.lost for block in mine)) > 0:
            share = lost / sum(block.total for block in mine)
            worst = max(block.lost / block.total for block in mine)
            yield (
                f"'{member.id}' is compressed to rank {member.rows}, which discards {share:.2%} of its energy (squared "
                f"Frobenius norm), {worst:.2%} in the worst module."
            )


def _config(plan: Plan, layout: Layout) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": plan.adapters[0].config.base_model_name_or_path,
        "inference_mode": True,
        "r": layout.rank,
        "lora_alpha": layout.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({module.rpartition(".")[2] for module in plan.modules}),
        "init_lora_weights": MARK,
        KEY: layout.model_dump(mode="json"),
    }


def _tensor(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side}.weight"
