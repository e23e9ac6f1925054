"""Slices of a run: `tag=composition`, `task!=reverse`, `expert=add`, `length<200`, `regime=ood`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import ge, gt, le, lt
from typing import Literal, get_args

import numpy as np

from eval.columns import Asked
from eval.records import REGIMES, Regime

By = Literal["tag", "task", "expert", "length"]
QUARTERS = 4
_TERM = re.compile(r"\s*(tag|task|expert|regime|length)\s*(!=|<=|>=|=|<|>)\s*(.+?)\s*")
_BETWEEN = re.compile(r",\s*(?=(?:tag|task|expert|regime|length)\s*(?:!=|[<>=]))")
_ORDER: dict[str, Callable[[int, int], bool]] = {"<": lt, "<=": le, ">": gt, ">=": ge}


class BadSlice(ValueError):
    """A slice that cannot be read, or that nothing is in."""


@dataclass(frozen=True)
class Where:
    """Terms that all have to hold; `regimes` are those that are wanted."""

    text: str
    terms: tuple[tuple[str, str, str], ...] = ()
    regimes: tuple[Regime, ...] = REGIMES

    @classmethod
    def parse(cls, given: str | Iterable[str] | None) -> Where:
        """Terms in several strings, or with commas between them. Raises BadSlice."""
        texts = [given] if isinstance(given, str) else list(given or ())
        split = [each.strip() for text in texts for each in _BETWEEN.split(text) if each.strip()]
        terms, regimes = [], set(REGIMES)
        for text in split:
            name, sign, value = _term(text)
            if name == "regime":
                regimes &= {each for each in REGIMES if (each == value) == (sign == "=")}
            else:
                terms.append((name, sign, value))
        return cls(", ".join(split), tuple(terms), tuple(each for each in REGIMES if each in regimes))

    def holds(self, example: Asked) -> bool:
        return all(_holds(example, *term) for term in self.terms)


def _term(text: str) -> tuple[str, str, str]:
    match = _TERM.fullmatch(text)
    if match is None:
        raise BadSlice(
            f"'{text}': no slice. One is NAME=VALUE or NAME!=VALUE, NAME one of tag, task, expert, regime; or "
            "length<200 (also <=, >, >=, =, !=)."
        )
    name, sign, value = match.groups()
    if name == "length" and not value.isdigit():
        raise BadSlice(f"'{text}': a length is a whole number of characters.")
    if name != "length" and sign not in ("=", "!="):
        raise BadSlice(f"'{text}': only lengths are compared; use {name}={value} or {name}!={value}.")
    if name == "regime" and value not in REGIMES:
        raise BadSlice(f"'{text}': no such regime. There are: {', '.join(REGIMES)}.")
    return name, sign, value


def _holds(example: Asked, name: str, sign: str, value: str) -> bool:
    if name == "length" and sign in _ORDER:
        return _ORDER[sign](example.length, int(value))
    if name == "length":
        return (example.length == int(value)) == (sign == "=")
    return (value in _values(example, name)) == (sign == "=")


def _values(example: Asked, name: str) -> tuple[str, ...]:
    match name:
        case "tag":
            return example.tags
        case "expert":
            return example.owners
        case _:
            return (example.task,)


def slices(by: By, examples: Sequence[Asked]) -> list[str]:
    """One slice for each value that there is; of lengths quarters, with as many examples in each as ties allow."""
    if by not in get_args(By):
        raise BadSlice(f"by='{by}': tables are made by {', '.join(get_args(By))}.")
    if by != "length":
        return [f"{by}={value}" for value in dict.fromkeys(v for each in examples for v in _values(each, by))]
    lengths = np.array([each.length for each in examples])
    shares = np.arange(1, QUARTERS) / QUARTERS
    ends = sorted({int(end) for end in np.quantile(lengths, shares, method="inverted_cdf")} - {int(lengths.max())})
    bounds = zip([None, *ends], [*ends, None], strict=True)
    return [
        ", ".join(
            term
            for term in (f"length>{low}" if low is not None else "", f"length<={high}" if high is not None else "")
            if term
        )
        or "length>=0"
        for low, high in bounds
    ]
