"""Blends of blends, taken apart into the experts that they are made of.

A blend that is a weighted sum, sum_j c_j dW_j, can stand in another one with weight w: then its members do, with
weights w c_j. Other operators give what no weights of the members give, and are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from router.blending.errors import BlendError
from router.blending.operators import operator_of

#: Operators that give a weighted sum of the members' updates.
SUMS = ("cat", "task_arithmetic", "smear")
#: Digits after the point that weights keep: 0.7 * 0.1 is 0.07, and what cancels is gone.
DIGITS = 12


@dataclass(frozen=True)
class Nested:
    """A blend among what another one is to be made of: its members' weights by expert's id."""

    name: str
    members: Mapping[str, float]
    operator: str = "cat"
    settings: Mapping[str, Any] = field(default_factory=dict)


def flatten(ingredients: Sequence[tuple[str | Nested, float]], operator: str) -> dict[str, float]:
    """Experts (ids) and blends with their weights -> each expert once, with its weight in all.

    Weights of one expert add up; experts whose weights cancel are left out, unless nothing else is there.
    Raises BlendError with every reason.
    """
    reasons: list[str] = []
    shares: dict[str, list[float]] = {}
    for each, weight in ingredients:
        if isinstance(each, str):
            shares.setdefault(each, []).append(weight)
        elif against := list(_against(each, operator)):
            reasons += against
        else:
            for expert, c in coefficients(each).items():
                shares.setdefault(expert, []).append(weight * c)
    if reasons:
        raise BlendError(reasons)
    weights = {expert: _total(parts) for expert, parts in shares.items()}
    return {expert: weight for expert, weight in weights.items() if weight != 0} or weights


def coefficients(blend: Nested) -> dict[str, float]:
    """The c of a blend that is sum_j c_j dW_j: its operator is one of `SUMS`."""
    scale = getattr(operator_of(blend.operator, blend.settings).settings, "scale", 1.0)
    total = math.fsum(blend.members.values()) if blend.operator == "smear" else 1.0
    return {expert: scale * weight / total for expert, weight in blend.members.items()}


def _against(blend: Nested, operator: str) -> Iterator[str]:
    name = f"Blend '{blend.name}'"
    if operator not in SUMS:
        yield (
            f"{name} cannot be a member of a '{operator}' blend, which is no weighted sum (as {', '.join(SUMS)} are): "
            "name its members instead."
        )
    elif blend.operator not in SUMS:
        yield f"{name} is a '{blend.operator}' blend, which is no weighted sum of its members: name them instead."
    elif blend.settings.get("rank") is not None:
        yield f"{name} is cut to rank {blend.settings['rank']}, so that it is not the sum of its members."
    elif operator == "smear" and not math.isclose(math.fsum(coefficients(blend).values()), 1.0):
        yield f"{name} is no average of its members (their weights do not add up to 1), as 'smear' needs it."


def _total(parts: Sequence[float]) -> float:
    try:
        return round(math.fsum(parts), DIGITS)
    except (OverflowError, ValueError):  # infinities, of one sign or both
        return math.nan
