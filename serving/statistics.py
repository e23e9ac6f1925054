"""Statistics of experts, which the operators `regmean` and `fisher` need: kept with the experts.

They are as large as the weights that an expert adapts: for every adapted module a Gram matrix (d_in, d_in), or the
Fisher information's diagonal (d_out, d_in), float32.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import get_args

from adapters_registry.expert import Expert
from adapters_registry.registry import Registry
from adapters_registry.tensors import LIMIT
from router.adapter import Adapter
from router.blending.operator import Statistic

KINDS: tuple[Statistic, ...] = get_args(Statistic)


def reason_against(expert: Expert, kind: Statistic) -> str | None:
    """Why these statistics cannot be had; None when they can."""
    if not expert.samples:
        return "it has no samples"
    if kind == "fisher" and not any(sample.answer for sample in expert.samples):
        return "none of its samples has an answer, which Fisher information is about"
    shapes = list(shapes_of(expert.path, kind).values())
    size = 4 * sum(map(math.prod, shapes))
    if size > LIMIT:
        largest = " x ".join(map(str, max(shapes, key=math.prod)))
        return (
            f"they would take {size / 2**20:,.0f} MiB ({len(shapes)} matrices of up to {largest}), more than the "
            f"{LIMIT >> 20} MiB that the registry keeps"
        )
    return None


def shapes_of(folder: Path, kind: Statistic) -> dict[str, tuple[int, int]]:
    """{module: (d_in, d_in)} for `gram`, {module: (d_out, d_in)} for `fisher`."""
    adapter = Adapter(folder)
    shapes = {module: adapter.shape(module) for module in adapter.modules}
    return {module: (d_in if kind == "gram" else d_out, d_in) for module, (d_out, d_in) in shapes.items()}


def is_measured(registry: Registry, expert: Expert, kind: Statistic) -> bool:
    """Whether the statistics are there, and its samples have not been changed since."""
    if kind not in registry.tensor_keys(expert.name, expert.version):
        return False
    for event in reversed(registry.events(expert.name)):
        if event.version == expert.version:
            if event.action == "tensors" and event.detail["key"] == kind:
                return True
            if event.action == "update" and "samples" in event.detail["fields"]:
                return False
    return True
