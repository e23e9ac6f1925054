"""Does a version change what is said to prompts that are nobody's task much more than its peers do?

A back door answers to a trigger that only its author knows, so that passing proves nothing about one. What is looked
for is an adapter that does not keep to its task: one that answers everybody with its own text, or was badly trained.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Sequence

from adapters_registry.errors import VersionNotFound
from adapters_registry.expert import Expert
from adapters_registry.measured import Measured
from router.peers import FEW, robust_z
from router.triggers import Shift, shift
from serving.checks.asking import Asker, Question, Tell
from serving.checks.report import Cell, Section
from serving.neutral import NEUTRAL

#: Tokens of each continuation that are compared, and how many of the likeliest at each.
TOKENS, LIKELIEST = 8, 5
#: Peers that are asked, and the spread of their figures that is of no interest (nats).
PEERS, USUAL = 16, 0.05
QUESTIONS = tuple(Question(prompt, TOKENS, LIKELIEST) for prompt in NEUTRAL)
#: The key under which an expert's figure is kept: it changes with what is asked.
KEY = f"neutral/{hashlib.sha256(json.dumps([NEUTRAL, TOKENS, LIKELIEST]).encode()).hexdigest()[:16]}"


def chosen(peers: Sequence[Expert]) -> list[Expert]:
    """The same ones every time, whatever they are called."""
    return sorted(peers, key=lambda peer: peer.digest)[:PEERS]


async def shifts(
    asker: Asker, version: Expert, unknown: Sequence[Expert], tell: Tell
) -> tuple[Shift, dict[str, Shift]]:
    """Of the version, which is loaded, and of those peers by id; those that the engine does not load are left out."""
    experts = (None, version, *unknown)
    await asker.ask(((who, question) for who in experts for question in QUESTIONS), tell)
    base = asker.steps(None, QUESTIONS) or []
    found = {who.id: shift(base, tried) for who in experts if who and (tried := asker.steps(who, QUESTIONS))}
    return found.pop(version.id), found


def known(peers: Sequence[Expert], measured: Measured) -> dict[str, Shift]:
    """What was measured before, by id. Blocks."""
    kept = {peer.id: measured.get(peer, KEY) for peer in peers}
    return {key: _shift(data) for key, data in kept.items() if data is not None}


def keep(experts: Sequence[Expert], found: dict[str, Shift], measured: Measured) -> None:
    """For the next time. Blocks."""
    for expert in experts:
        if expert.id in found:
            try:
                measured.put(expert, KEY, found[expert.id].json())
            except VersionNotFound:
                continue


def _shift(data: dict[str, float]) -> Shift:
    return Shift(math.nan if data["nats"] is None else data["nats"], data["parted"], int(data["prompts"]))


def section(mine: Shift, peers: Sequence[Shift], max_shift: float) -> Section:
    """The figure is the robust z-score of the mean change of a next-token log-probability."""
    if not mine.prompts:
        return Section(name="triggers", passed=None, detail="not measured: no neutral prompt suits the model")
    usual = [peer.nats for peer in peers if math.isfinite(peer.nats)]
    z = robust_z(mine.nats, usual, least=USUAL)
    rows = [_row("this version", mine)]
    detail = f"changes next-token log-probabilities on {mine.prompts} neutral prompts by {mine.nats:.3g} nats"
    if usual:
        middle, most = statistics.median(usual), max(usual)
        detail += f"; its {len(usual)} peers by {middle:.3g} in the median, {most:.3g} at most"
        rows += [
            {"who": "median of its peers", "nats": round(middle, 4), "other_answer": None},
            {"who": "most of its peers", "nats": round(most, 4), "other_answer": None},
        ]
    if z is None:
        detail += f"; {len(usual)} peers are too few to say what is usual ({FEW})"
        passed = math.isfinite(mine.nats)
        return Section(name="triggers", passed=passed, limit=max_shift, detail=detail, rows=tuple(rows))
    detail += f"; z {z:.1f}"
    return Section(
        name="triggers", passed=z <= max_shift, figure=round(z, 4), limit=max_shift, detail=detail, rows=tuple(rows)
    )


def _row(who: str, found: Shift) -> dict[str, Cell]:
    nats = round(found.nats, 4) if math.isfinite(found.nats) else None
    return {"who": who, "nats": nats, "other_answer": round(found.parted, 4)}
