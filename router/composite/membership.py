"""What composites and blends ask alike of the adapters that are to go together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from safetensors import SafetensorError

from router.adapter import Adapter
from router.composite.part import Part

Kind = TypeVar("Kind", bound=Adapter)


def read_members(parts: Sequence[Part], kind: Callable[[Part], Kind]) -> tuple[list[tuple[Part, Kind]], list[str]]:
    """Every part with its adapter, and why others cannot be read."""
    named, reasons = [], []
    for part in parts:
        try:
            named.append((part, kind(part)))
        except (OSError, ValueError, SafetensorError) as error:
            reasons.append(f"'{part.id}' cannot be read: {str(error).splitlines()[0]}")
    return named, reasons


def different_bases(named: Sequence[tuple[Part, Adapter]]) -> Iterator[str]:
    """Folders say nothing about which weights are in them, so that of configurations only Hub ids count."""
    bases: dict[str, list[str]] = {}
    for part, adapter in named:
        declared = adapter.config.base_model_name_or_path or ""
        base = part.base_model or (declared if declared.count("/") == 1 and declared[0] not in "/.~" else None)
        if base:
            bases.setdefault(base.casefold(), []).append(part.id)
    if len(bases) > 1:
        listed = "; ".join(f"{base}: {listing(ids)}" for base, ids in sorted(bases.items()))
        yield f"The experts are for different base models ({listed}); only experts of one base model fit together."


def common_shapes(named: Sequence[tuple[Part, Adapter]]) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """{module: (d_out, d_in)} of all modules, sorted, and contradictions."""
    modules: dict[str, tuple[int, int]] = {}
    first: dict[str, str] = {}
    conflicts: dict[tuple[str, str], str] = {}
    for part, adapter in named:
        for module in sorted(adapter.names.A.keys() & adapter.names.B.keys()):
            shape = adapter.shape(module)
            known, owner = modules.setdefault(module, shape), first.setdefault(module, part.id)
            if known != shape:
                contrast = f"{known[0]} x {known[1]} for the first and {shape[0]} x {shape[1]} for the second"
                conflicts.setdefault((owner, part.id), f"{module} is {contrast}")
    reasons = [f"'{a}' and '{b}' are for different base models: {what}." for (a, b), what in conflicts.items()]
    return dict(sorted(modules.items())), reasons


def unpaired(part: Part, adapter: Adapter) -> Iterator[str]:
    if odd := sorted(adapter.names.A.keys() ^ adapter.names.B.keys()):
        yield f"'{part.id}' has only one of the two factors of {listing(odd)}; it is damaged, register it again."


def listing(things: Sequence[str], most: int = 3) -> str:
    more = f" and {len(things) - most} more" if len(things) > most else ""
    return ", ".join(things[:most]) + more
