"""What the searches for a blend's weights share. They need a labelled set, which stays with the caller."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from router.taxonomy import Reference


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """What a search declares, for the table that operators are in, too."""

    formula: str
    reference: Reference
    seeded: bool


class Tried(NamedTuple):
    weights: tuple[float, ...]
    value: float


class Found(NamedTuple):
    """The weights, what the callback said of them, and everything that was tried, in order."""

    weights: tuple[float, ...]
    value: float
    history: tuple[Tried, ...]


def distinct(
    evaluate: Callable[[Sequence[float]], float],
) -> tuple[Callable[[Sequence[float]], float], dict[tuple[float, ...], float]]:
    """The same callback, asked once for each set of weights, and what it said. Raises ValueError when it says NaN."""
    said: dict[tuple[float, ...], float] = {}

    def ask(weights: Sequence[float]) -> float:
        key = tuple(weights)
        if key not in said:
            value = float(evaluate(key))
            if math.isnan(value):
                raise ValueError(f"The labelled set gave NaN for the weights {list(key)}.")
            said[key] = value
        return said[key]

    return ask, said
