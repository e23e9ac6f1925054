"""Blends: several experts merged into one plain adapter, which any engine can load (docs/blending.md)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from router.blending.errors import BlendError
from router.blending.folder import LINEAGE, Report, write_blend
from router.blending.lorahub import lorahub
from router.blending.operator import Operator
from router.blending.operators import OPERATORS, SEARCHES, operator_of, operators_table
from router.blending.plan import check_weights, make_plan
from router.blending.soup import soup
from router.composite.part import Part, stored_digest

__all__ = [
    "LINEAGE",
    "OPERATORS",
    "SEARCHES",
    "BlendError",
    "Operator",
    "Report",
    "blend",
    "blend_digest",
    "lorahub",
    "operators_table",
    "soup",
]

FORMAT = 1


def blend_digest(
    members: Sequence[Part],
    weights: Sequence[float],
    operator: str = "cat",
    settings: Mapping[str, Any] | None = None,
    *,
    max_rank: int,
) -> str:
    """sha256 (hex) of all that decides a blend's content; the order of the members does not.

    Raises BlendError for an operator or settings that do not exist; the members are not looked at.
    """
    key = {"max_rank": max_rank, **_lineage(members, weights, operator, settings or {})}
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def blend(
    folder: Path,
    members: Sequence[Part],
    weights: Sequence[float],
    operator: str = "cat",
    settings: Mapping[str, Any] | None = None,
    *,
    max_rank: int,
) -> Report:
    """Merge `members` into a PEFT folder: float32, alpha = r, at most `max_rank`, with its lineage in blend.json.

    The folder appears when it is complete, or not at all; it must not exist, be empty, or hold this blend already,
    which then stays. The same members, weights and settings give the same bytes, in whatever order they are named. A
    single member is not merged, whatever the operator: it is scaled by its weight, or left as it is where weights are
    relative. Members of weight 0 take no part.
    Where a member does not adapt a module, it takes no part in that module.
    Raises BlendError with every reason, and OSError.
    """
    plan = make_plan(members, weights, operator, settings or {}, max_rank)
    digest = blend_digest(members, weights, operator, settings, max_rank=max_rank)
    return write_blend(folder, plan, {"digest": digest, **_lineage(members, weights, operator, settings or {})})


def _lineage(
    members: Sequence[Part], weights: Sequence[float], operator: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    chosen = operator_of(operator, settings)
    if reasons := list(check_weights(members, weights)):
        raise BlendError(reasons)
    needed = chosen.statistic
    listed = []
    for part, weight in sorted(zip(members, weights, strict=True), key=lambda pair: (pair[0].digest, pair[0].id)):
        member: dict[str, Any] = {"id": part.id, "digest": part.digest, "weight": float(weight)}
        if needed is not None:
            only = Part(part.id, part.digest, part.path, {needed: part.tensors.get(needed, {})})
            member["statistics"] = stored_digest(only)
        listed.append(member)
    return {
        "format": FORMAT,
        "operator": operator,
        "settings": chosen.settings.model_dump(mode="json"),
        "members": listed,
    }
