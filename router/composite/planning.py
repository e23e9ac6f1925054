"""May these experts become a composite? Every reason against it, and if there is none, its layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from router.adapter import Adapter
from router.composite.membership import common_shapes, different_bases, listing, read_members, unpaired
from router.composite.parallel import in_threads
from router.composite.part import CompositeError, Part
from router.composite.statistics import statistics_key, tables_of
from router.gating import GATES, gate_of
from router.gating.gate import Gate
from router.gating.genknowsub import subtract
from router.gating.layout import Layout, Member
from router.lowrank import Factors, singular_values

#: Layers that engines adapt in another way than plain linear layers, or not at all, by a part of their path.
UNSUPPORTED = {
    "lm_head": "the output layer",
    "embed_tokens": "embeddings",
    "experts": "fused mixture-of-experts layers",
}

Named = Sequence[tuple[Part, Adapter]]


@dataclass(frozen=True, eq=False)
class Plan:
    """A composite that can be built. `modules` has the union of all experts' modules, sorted."""

    parts: Sequence[Part]
    adapters: Sequence[Adapter]
    general: Adapter | None
    gate: Gate
    layout: Layout
    modules: Mapping[str, tuple[int, int]]  # module -> (d_out, d_in)
    key: str | None  # of the statistics
    compressed: bool


def chosen_settings(gate: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a gate, defaults included, as JSON. Raises CompositeError."""
    if gate not in GATES:
        raise CompositeError([f"No gate '{gate}'. There are: {', '.join(GATES)}."])
    try:
        return GATES[gate].Settings.model_validate(dict(settings)).model_dump(mode="json")
    except ValidationError as error:
        known = ", ".join(GATES[gate].Settings.model_fields) or "none"
        raise CompositeError(
            f"Gate '{gate}', setting {'.'.join(str(part) for part in each['loc']) or 'weights'}: {each['msg']} "
            f"(got {str(each['input'])[:80]}). Its settings: {known}."
            for each in error.errors()
        ) from error


def make_plan(
    parts: Sequence[Part],
    gate: str,
    settings: Mapping[str, Any],
    max_rank: int,
    general: Part | None,
    compress: int | None,
) -> Plan:
    """Raises CompositeError with every reason that can be found: some keep it from looking further."""
    reasons = [*_membership(parts, general), *_setting_problems(gate, settings, compress)]
    named, broken = read_members([*parts, *([general] if general else [])], lambda part: Adapter(part.path))
    if broken or not parts:
        raise CompositeError([*reasons, *broken])
    modules, conflicts = common_shapes(named)
    reasons += [*different_bases(named), *_unsupported(named), *conflicts]
    if reasons:
        raise CompositeError(reasons)
    adapters = [adapter for _, adapter in named]
    subtracted = adapters.pop() if general else None
    rows = [_rows(adapter, subtracted, modules, compress) for adapter in adapters]
    layout, ready = _layout(parts, rows, gate, chosen_settings(gate, settings))
    key = statistics_key(ready, general=general, compress=compress)
    made = Plan(parts, adapters, subtracted, ready, layout, modules, key, compress is not None)
    if reasons := [*_rank(made, max_rank), *_stored(made)]:
        raise CompositeError(reasons)
    return made


def _layout(parts: Sequence[Part], rows: Sequence[int], gate: str, settings: dict[str, Any]) -> tuple[Layout, Gate]:
    members = tuple(Member(id=part.id, rows=each) for part, each in zip(parts, rows, strict=True))
    extra = len(members) if GATES[gate].extra else 0
    layout = Layout(gate=gate, settings=settings, members=members, extra=extra)
    try:
        ready = gate_of(layout)
    except ValueError as error:
        raise CompositeError([f"Gate '{gate}': {error}."]) from error
    return layout.model_copy(update={"form": ready.form}), ready


def _setting_problems(gate: str, settings: Mapping[str, Any], compress: int | None) -> Iterator[str]:
    try:
        chosen_settings(gate, settings)
    except CompositeError as error:
        yield from error.reasons
    if compress is not None and compress < 1:
        yield f"compress is {compress}; it is a rank, so at least 1."


def _membership(parts: Sequence[Part], general: Part | None) -> Iterator[str]:
    if len(parts) < 2:
        got = f"only '{parts[0].id}'" if parts else "none"
        yield f"A composite needs at least two experts; it got {got}."
    for name, count in Counter(part.id for part in parts).items():
        if count > 1:
            yield f"Expert '{name}' occurs {count} times; leave the repetitions out."
    names: dict[str, list[str]] = {}
    for part in parts:
        names.setdefault(part.digest, []).append(part.id)
    for ids in names.values():
        if len(set(ids)) > 1:
            yield f"{listing(ids)} are the same adapter under different names; keep one of them."
    if general is not None and general.digest in names:
        yield f"'{general.id}' is general knowledge and a member; nothing would be left of it."


def _unsupported(named: Named) -> Iterator[str]:
    for part, adapter in named:
        found = {what for layer, what in UNSUPPORTED.items() if any(layer in m.split(".") for m in adapter.modules)}
        if adapter.names.embeddings:
            found.add("embeddings")
        for what in sorted(found):
            yield f"'{part.id}' adapts {what}, which cannot be gated; serve it alone."
        if not adapter.modules:
            yield f"'{part.id}' adapts nothing; it is damaged, register it again."
        if strange := adapter.names.unexpected:
            yield f"'{part.id}' is more than LoRA factors ({listing(strange)}), which stacking loses; serve it alone."
        yield from unpaired(part, adapter)


def _rows(
    adapter: Adapter, general: Adapter | None, modules: Mapping[str, tuple[int, int]], compress: int | None
) -> int:
    """An expert's rank rows: its largest rank over the modules."""
    taken = general.rank if general else lambda module: 0
    most = max(min(adapter.rank(module) + taken(module), *shape) for module, shape in modules.items())
    return most if compress is None else min(most, compress)


def _rank(plan: Plan, max_rank: int) -> Iterator[str]:
    layout = plan.layout
    if layout.rank <= max_rank:
        return
    K = len(layout.members)
    each = (max_rank - layout.extra) // K
    sizes = " + ".join(str(rows) for rows in layout.blocks) + (f" + {layout.extra}" if layout.extra else "")
    fits = 0
    while fits < K and sum(sorted(layout.blocks)[: fits + 1]) + (fits + 1) * bool(layout.extra) <= max_rank:
        fits += 1
    offers = [f"the {fits} smallest of them would fit"] if fits > 1 else []
    if each >= 1:
        least, most = (f"{share:.1%}" for share in _discarded(plan, each))
        offers.append(
            f"compress={each} would keep the {each} strongest directions of each and discard {least} to {most} of an "
            "expert's energy (squared Frobenius norm)"
        )
    advice = "; ".join(offers) or "raise the engine's limit"
    yield f"The composite has {layout.rank} rank rows ({sizes}), over the engine's limit of {max_rank}: {advice}."


def _discarded(plan: Plan, rank: int) -> tuple[float, float]:
    """The least and the largest share of a member's squared Frobenius norm that is beyond the first directions."""

    def energies(module: str) -> list[tuple[float, float]]:  # lost and total, of every member
        found = []
        for adapter in plan.adapters:
            factors = changes(adapter, plan.general, module)
            energy = torch.zeros(1) if factors is None else singular_values(factors).square()
            found.append((float(energy[rank:].sum()), float(energy.sum())))
        return found

    lost, total = np.sum(list(in_threads(energies, plan.modules)), 0).T  # (K,) each
    shares = lost / np.where(total > 0, total, 1.0)
    return float(shares.min()), float(shares.max())


def changes(adapter: Adapter, general: Adapter | None, module: str) -> Factors | None:
    """What an expert changes in a module, with general knowledge taken out; None for nothing."""
    factors = adapter.factors(module)
    return factors if general is None else subtract(factors, general.factors(module))


def _stored(plan: Plan) -> Iterator[str]:
    """Vectors and statistics that the gate needs and an expert does not bring, or brings in the wrong shape."""
    layout, general = plan.layout, plan.general
    for part, adapter, member in zip(plan.parts, plan.adapters, layout.members, strict=True):
        mine = [module for module in plan.modules if adapter.rank(module) or (general and general.rank(module))]
        if plan.gate.extra:
            shapes = {module: (plan.modules[module][1],) for module in mine}
            advice = f"train them with `moerge gates train {_name(part)}`"
            yield from _lacking(part, layout.gate, shapes, f"gate vectors for '{layout.gate}'", advice)
        if (tables := tables_of(plan.gate)) and plan.key is not None:
            sizes: dict[str, tuple[int, ...]] = {"mean": (), "deviation": (), "centre": (member.rows,)}
            wanted = {f"{module}.{table}": sizes[table] for module in mine for table in tables}
            advice = f"measure them with `moerge gates calibrate {_name(part)}`"
            yield from _lacking(part, plan.key, wanted, f"'{plan.key}'", advice)


def _lacking(part: Part, key: str, shapes: Mapping[str, tuple[int, ...]], what: str, advice: str) -> Iterator[str]:
    stored = part.tensors.get(key)
    if stored is None:
        yield f"'{part.id}' has no {what}; {advice}."
        return
    if missing := [name for name in shapes if name not in stored]:
        yield f"'{part.id}' lacks {what} of {listing(missing)}; {advice}."
    wrong = [
        f"{name} ({tuple(stored[name].shape)} instead of {shape})"
        for name, shape in shapes.items()
        if name in stored and tuple(stored[name].shape) != shape
    ]
    if wrong:
        yield f"'{part.id}' has {what} of another shape for {listing(wrong)}; {advice}."


def _name(part: Part) -> str:
    return part.id.partition("@")[0]
