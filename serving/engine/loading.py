"""What is checked before an adapter gets into the engine: everything that would fail, or lie, once it is there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from safetensors.torch import load_file
from torch import Tensor

from router.composite import check_composite
from router.gating.layout import KEY, MARK, TABLES, Layout


class AdapterRefused(ValueError):
    """An adapter that this engine cannot run; the message has every reason."""

    def __init__(self, reasons: Sequence[str]) -> None:
        super().__init__(" ".join(reasons))
        self.reasons = tuple(reasons)


@dataclass(frozen=True)
class Weights:
    """Shapes of one module's factors in an adapter, None where one is missing; the rank that its config declares."""

    A: tuple[int, ...] | None
    B: tuple[int, ...] | None
    rank: int

    @classmethod
    def of(cls, A: Tensor | None, B: Tensor | None, rank: int) -> Self:
        shape_A, shape_B = (None if factor is None else tuple(factor.shape) for factor in (A, B))
        return cls(shape_A, shape_B, rank)


def read_layout(folder: Path) -> Layout | None:
    """The layout of a composite; None for a plain adapter, or none at all.

    Raises CompositeError when the folder is not what its layout says, and AdapterRefused when it has half of the
    marks of a composite.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterRefused([f"adapter_config.json cannot be read: {error}."]) from error
    if not isinstance(config, dict):
        raise AdapterRefused(["adapter_config.json holds no object."])
    if KEY in config:
        return check_composite(folder)
    if config.get("init_lora_weights") == MARK:
        raise AdapterRefused([f"adapter_config.json says '{MARK}' but has no '{KEY}': nothing says how to weigh it."])
    return None


def read_tables(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The gate's constants of a composite that was checked, by module and table."""
    tables: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(folder / TABLES).items():
        module, _, name = key.rpartition(".")
        tables.setdefault(module, {})[name] = tensor
    return tables


def reasons_against(
    weights: Mapping[str, Weights],
    places: Mapping[str, tuple[int, int | None]],
    max_rank: int,
    *,
    complete: bool = True,
) -> list[str]:
    """Why an adapter does not fit the model; `places` has (d_in, d_out) of every module that can be adapted, with
    d_out None where it is not known.

    `complete` is False where this process has only some of the model's layers.
    """
    reasons = []
    unknown = sorted(set(weights) - set(places)) if complete else []
    if unknown:
        some = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        reasons.append(f"The model has no such module, or the engine does not adapt it: {some}.")
    for module, found in weights.items():
        if module not in places:
            continue
        d_in, d_out = places[module]
        if found.A is None or found.B is None:
            reasons.append(f"{module} lacks lora_{'A' if found.A is None else 'B'}.")
        elif (found.rank, d_in) != found.A or (d_out or found.B[0], found.rank) != found.B:
            want = f"A ({found.rank}, {d_in}) and B ({d_out or found.B[0]}, {found.rank})"
            reasons.append(f"{module} has A {found.A} and B {found.B}; the model and the declared rank want {want}.")
        elif found.rank > max_rank:
            reasons.append(f"{module} has rank {found.rank}; the engine's limit is {max_rank}.")
    if not weights:
        reasons.append("It adapts no module.")
    return reasons[:8]
