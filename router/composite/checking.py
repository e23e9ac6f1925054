"""Is this folder a composite that its own layout describes? What an engine asks before it loads one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from adapters_registry.lora import CONFIG, WEIGHTS
from adapters_registry.lora import Layout as Names
from router.composite.part import CompositeError
from router.composite.statistics import tables_of
from router.gating import GATES, gate_of
from router.gating.gate import Gate
from router.gating.layout import FORMAT, KEY, MARK, TABLES, Layout


def check_composite(folder: Path) -> Layout:
    """The layout of a composite folder. Raises CompositeError, which says what contradicts what.

    Reads the configuration, names and shapes; of the weights only the columns of B that must be zero.
    """
    config = _config(folder)
    layout, gate = _layout(folder, config)
    reasons = list(_contradictions(config, layout))
    widths: dict[str, int] = {}
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as weights:
            reasons += _factors(weights, layout, widths)
        with safe_open(folder / TABLES, framework="pt") as tables:
            reasons += _tables(tables, layout, gate, widths)
    except (OSError, SafetensorError) as error:
        reasons.append(f"its tensors cannot be read: {error}")
    if reasons:
        raise CompositeError(f"{folder.name}: {reason}" for reason in reasons)
    return layout


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CompositeError([f"{folder.name}: {CONFIG} cannot be read: {error}"]) from error
    if not isinstance(config, dict) or KEY not in config:
        raise CompositeError([f"{folder.name}: {CONFIG} has no '{KEY}', so this is no composite"])
    return config


def _layout(folder: Path, config: dict[str, Any]) -> tuple[Layout, Gate]:
    raw = config[KEY]
    version = raw.get("format") if isinstance(raw, dict) else None
    if version != FORMAT:
        raise CompositeError([f"{folder.name}: its layout has format {version}; this release reads {FORMAT}"])
    try:
        layout = Layout.model_validate(raw)
        if layout.gate not in GATES:
            raise CompositeError([f"{folder.name}: there is no gate '{layout.gate}', only {', '.join(GATES)}"])
        return layout, gate_of(layout)
    except ValidationError as error:
        raise CompositeError(
            f"{folder.name}: {KEY}.{'.'.join(str(part) for part in each['loc'])}: {each['msg']}"
            for each in error.errors()
        ) from error
    except CompositeError:
        raise
    except ValueError as error:
        raise CompositeError([f"{folder.name}: {KEY}: {error}"]) from error


def _contradictions(config: dict[str, Any], layout: Layout) -> Iterator[str]:
    """The configuration against the layout."""
    wanted = {"peft_type": "LORA", "init_lora_weights": MARK, "r": layout.rank, "lora_alpha": layout.rank}
    for key, value in wanted.items():
        if config.get(key) != value:
            yield f"{CONFIG} says {key} = {config.get(key)!r}, the layout needs {value!r}"
    for key in ("rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "modules_to_save"):
        if config.get(key):
            yield f"{CONFIG} sets {key}, which a composite never has"
    gate = GATES[layout.gate]
    if bool(layout.extra) != gate.extra:
        needed = "one for each member" if gate.extra else "none"
        yield f"the layout has {layout.extra} extra rows, gate '{layout.gate}' needs {needed}"
    if layout.form != (form := gate_of(layout).form):
        yield f"the layout is in {layout.form} form, gate '{layout.gate}' with its settings needs {form}"


def _factors(weights: Any, layout: Layout, widths: dict[str, int]) -> Iterator[str]:
    """A (R, d_in) and B (d_out, R) for every module; fills `widths` with d_in of the modules."""
    names = Names()
    for name in weights.keys():  # noqa: SIM118 (not a mapping)
        names.add(name, tuple(weights.get_slice(name).get_shape()))
    if odd := [*names.unexpected, *names.embeddings, *names.copies]:
        yield f"{WEIGHTS} holds {', '.join(odd[:3])}, which is no factor of a module"
    if unpaired := sorted(names.A.keys() ^ names.B.keys()):
        yield f"{WEIGHTS} has only one factor of {', '.join(unpaired[:3])}"
    if not names.modules:
        yield f"{WEIGHTS} holds no factors"
    for module in sorted(names.A.keys() & names.B.keys()):
        (_, A), (name, B) = names.A[module], names.B[module]
        if len(A) != 2 or len(B) != 2 or A[0] != layout.rank or B[1] != layout.rank:
            yield f"{module} has factors of {B} and {A}, the layout {layout.rank} rank rows"
            continue
        widths[module] = A[1]
        if layout.extra and weights.get_slice(name)[:, layout.rank - layout.extra :].any():
            yield f"{module}: columns of B for rows that only feed the gate are not zero"


def _tables(tables: Any, layout: Layout, gate: Gate, widths: dict[str, int]) -> Iterator[str]:
    K, R = len(layout.members), layout.rank
    shapes = {"present": (K,), "scale": (R,), "mean": (K,), "deviation": (K,), "centre": (R,)}
    found: dict[str, set[str]] = {table: set() for table in shapes}
    for name in tables.keys():  # noqa: SIM118 (not a mapping)
        if name == "format":
            continue
        module, _, table = name.rpartition(".")
        shape = tuple(tables.get_slice(name).get_shape())
        if table not in shapes or module not in widths:
            yield f"{TABLES} holds {name}, for which there is no module or no use"
        elif shape != shapes[table]:
            yield f"{TABLES} holds {name} of shape {shape}, the layout needs {shapes[table]}"
        else:
            found[table].add(module)
    needed = [*tables_of(gate), *(["scale"] if gate.needs_scale else [])]
    for table in needed:
        if missing := sorted(widths.keys() - found[table]):
            yield f"{TABLES} lacks {table} of {', '.join(missing[:3])}, which gate '{layout.gate}' needs"
