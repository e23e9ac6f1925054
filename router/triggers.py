"""How far an adapter moves the base model on prompts that it is not for: does it do more than its peers do?

A back door answers a trigger, which nobody else knows. What can be looked for is an adapter that changes what is said
to neutral prompts much more than others of its kind, which is also what a badly trained one does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

#: (token, {token: log-probability} of the likeliest) of one step of a greedy continuation.
Step = tuple[str, dict[str, float]]


@dataclass(frozen=True)
class Shift:
    """nats     mean change of a next-token log-probability, over the prompts' means; NaN: a log-probability is none
    parted   share of the prompts whose greedy continuation is another one
    prompts  that both answered
    """

    nats: float
    parted: float
    prompts: int

    def json(self) -> dict[str, Any]:
        return asdict(self) | {"nats": self.nats if math.isfinite(self.nats) else None}


def shift(base: Sequence[Sequence[Step]], tried: Sequence[Sequence[Step]]) -> Shift:
    """From the base model's continuation of each prompt to the adapter's; prompts that one did not answer do not count.

    Steps are compared up to and with the first at which the two say another token: from there on they continue other
    texts.
    """
    pairs = [(one, other) for one, other in zip(base, tried, strict=True) if one and other]
    if not pairs:
        return Shift(0.0, 0.0, 0)
    means = [math.fsum(found) / len(found) for found in (list(changes(*pair)) for pair in pairs)]
    parted = [_parted(*pair) for pair in pairs]
    return Shift(math.fsum(means) / len(means), sum(parted) / len(parted), len(pairs))


def changes(base: Sequence[Step], tried: Sequence[Step]) -> Iterator[float]:
    """Of each step, the mean |log p'(t) - log p(t)| over the tokens t that either lists.

    Only the likeliest tokens are listed. One that is missing is at most as likely as the least likely that is there, so
    the change is at least what this says.
    """
    for (token, before), (other, after) in zip(base, tried, strict=False):
        listed = before.keys() | after.keys()
        if listed:
            yield math.fsum(_change(each, before, after) for each in listed) / len(listed)
        if token != other:
            return


def _change(token: str, before: dict[str, float], after: dict[str, float]) -> float:
    if token in before and token in after:
        return abs(after[token] - before[token])
    known, unknown = (before, after) if token in before else (after, before)
    return max(known[token] - min(unknown.values(), default=known[token]), 0.0)


def _parted(base: Sequence[Step], tried: Sequence[Step]) -> bool:
    return [token for token, _ in base] != [token for token, _ in tried]
