"""Composites: several experts stacked in one PEFT folder, with what a token-level gate needs to weigh them.

For every module `A = [A_1; ...; A_K; P]` and `B = [B_1 ... B_K, 0]`, each pair rewritten by an exact SVD of
`dW_k = s_k B_k A_k` so that the gate can read its scores from the rank-space buffer (docs/token-level-routing.md).
The folder cannot be loaded by anything that does not know gates: PEFT and stock vLLM refuse its `init_lora_weights`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from router.composite.building import build
from router.composite.checking import check_composite
from router.composite.part import CompositeError, Part, stored_digest
from router.composite.planning import chosen_settings, make_plan
from router.composite.statistics import statistics_key
from router.gating.layout import FORMAT, Layout

__all__ = [
    "CompositeError",
    "Part",
    "check_composite",
    "compose",
    "composite_digest",
    "plan",
    "statistics_key",
]


def composite_digest(
    parts: Sequence[Part],
    gate: str,
    settings: Mapping[str, Any],
    *,
    general: Part | None = None,
    compress: int | None = None,
) -> str:
    """sha256 (hex) of all that decides what a composite computes. Raises CompositeError for a gate or settings that
    do not exist; the experts are not looked at.
    """
    key = {
        "format": FORMAT,
        "gate": gate,
        "settings": chosen_settings(gate, settings),
        "members": [(part.id, part.digest, stored_digest(part)) for part in parts],
        "general": general and general.digest,
        "compress": compress,
    }
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def plan(
    parts: Sequence[Part],
    gate: str,
    settings: Mapping[str, Any],
    *,
    max_rank: int,
    general: Part | None = None,
    compress: int | None = None,
) -> Layout:
    """The layout of the composite that these experts would make. Cheap: reads names and shapes, no weights,
    except to say in a refusal what compression would cost.

    general   an adapter of general knowledge that is subtracted from every expert (GenKnowSub)
    compress  keep only so many singular directions of every expert: its best approximation of that rank
    Raises CompositeError with every reason against it.
    """
    return make_plan(parts, gate, settings, max_rank, general, compress).layout


def compose(
    folder: Path,
    parts: Sequence[Part],
    gate: str,
    settings: Mapping[str, Any],
    *,
    max_rank: int,
    general: Part | None = None,
    compress: int | None = None,
) -> Layout:
    """Write the composite to `folder`, which the caller moves into place when it is complete.

    The same experts and settings give the same bytes. What is worth knowing about the members is in the layout's
    notes. Raises CompositeError as `plan` does, and OSError.
    """
    return build(folder, make_plan(parts, gate, settings, max_rank, general, compress))
