"""Building a blend's folder: module by module in threads, written as they come, moved into place when complete."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
import tempfile
import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters_registry.lora import CONFIG, WEIGHTS
from router.blending.compress import Compressed, compress
from router.blending.plan import Plan
from router.composite.parallel import in_threads
from router.lowrank import Factors
from router.tensorfile import write_tensors

LINEAGE = "blend.json"
FRESH = 60  # seconds in which a draft may not have its lock yet


@dataclass(frozen=True)
class Report:
    """What a blend became.

    rank       of the adapter
    modules    how many it adapts
    cut        how many of them were cut to a lower rank
    discarded  the share of energy (squared Frobenius norm) that was cut off, over the modules that were cut
    worst      the same in the worst module
    """

    rank: int
    modules: int
    cut: int
    discarded: float
    worst: float


def write_blend(folder: Path, plan: Plan, lineage: dict[str, Any]) -> Report:
    """Write the adapter and its lineage; `folder` must not exist, be empty, or hold this very blend already, which then
    stays, also when another process was quicker. What killed processes began here is removed. Raises OSError, leaving
    nothing.
    """
    if done := finished(folder, lineage["digest"]):
        return done
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(folder)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    lock = os.open(draft, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # held for as long as this process lives
        report = _write(draft, plan, lineage)
        draft.chmod(0o755)  # mkdtemp's is private
        try:
            draft.rename(folder)
        except OSError:
            if not (done := finished(folder, lineage["digest"])):
                raise
            shutil.rmtree(draft)
            return done
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    finally:
        os.close(lock)
    return report


def finished(folder: Path, digest: str) -> Report | None:
    """The report of the blend that is there, if it is this one."""
    try:
        found = json.loads((folder / LINEAGE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    if found["digest"] != digest:
        return None
    return Report(**{each.name: found[each.name] for each in fields(Report)})


def remove_abandoned(folder: Path) -> None:
    """Remove drafts of this folder that no living process holds."""
    for draft in folder.parent.glob(f".{glob.escape(folder.name)}-????????"):
        if time.time() - draft.stat().st_mtime < FRESH:
            continue
        lock = os.open(draft, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(draft)
        except BlockingIOError:
            pass  # someone is at work on it
        finally:
            os.close(lock)


def _write(folder: Path, plan: Plan, lineage: dict[str, Any]) -> Report:
    rows = {module: plan.rows(module) for module in plan.modules}
    rank = max(rows.values())
    shapes = {}
    for module, (d_out, d_in) in plan.modules.items():
        shapes[_tensor(module, "A")] = (rank, d_in)
        shapes[_tensor(module, "B")] = (d_out, rank)
    cut: list[Compressed] = []

    def merge_and_pad(module: str) -> tuple[Factors, Compressed | None]:
        factors, compressed = merge_module(plan, module, rows[module])
        return Factors(A=_padded(factors.A, rank, 0), B=_padded(factors.B, rank, 1)), compressed

    def merged() -> Generator[Tensor]:
        for factors, compressed in in_threads(merge_and_pad, rows):
            if compressed is not None:
                cut.append(compressed)
            yield factors.A
            yield factors.B

    with closing(merged()) as tensors:
        write_tensors(folder / WEIGHTS, shapes, tensors)
    total = sum(each.total for each in cut)
    report = Report(
        rank=rank,
        modules=len(rows),
        cut=len(cut),
        discarded=sum(each.lost for each in cut) / total if total else 0.0,
        worst=max((each.lost / each.total for each in cut if each.total), default=0.0),
    )
    (folder / CONFIG).write_text(json.dumps(_config(plan, rank), indent=2) + "\n", encoding="utf-8")
    (folder / LINEAGE).write_text(json.dumps({**lineage, **asdict(report)}, indent=2) + "\n", encoding="utf-8")
    return report


def merge_module(plan: Plan, module: str, rows: int) -> tuple[Factors, Compressed | None]:
    """One module of the blend, float32, and what was lost when it had to be cut."""
    merged = plan.operator.merge(module, plan.shares(module))
    if isinstance(merged, Factors) and merged.A.shape[0] <= rows:
        return merged, None
    done = compress(merged, rows)
    return done.factors, done._replace(factors=Factors(torch.empty(0), torch.empty(0)))


def _padded(X: Tensor, rank: int, dim: int) -> Tensor:
    missing = rank - X.shape[dim]
    if not missing:
        return X
    shape = list(X.shape)
    shape[dim] = missing
    return torch.cat([X, X.new_zeros(shape)], dim)


def _config(plan: Plan, rank: int) -> dict[str, Any]:
    """As PEFT writes it; alpha = r, so that no engine scales anything."""
    bases = {member.source.config.base_model_name_or_path for member in plan.members}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": min((base for base in bases if base), default=None),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "target_modules": targets(plan.modules),
    }


def targets(modules: dict[str, tuple[int, int]] | Any) -> list[str]:
    """PEFT's `target_modules`: the ends of the paths."""
    return sorted({module.rpartition(".")[2] for module in modules})


def _tensor(module: str, side: str) -> str:
    return f"base_model.model.{module}.lora_{side}.weight"
