"""Conversations: who answered the turns so far goes on, unless somebody else would do clearly better.

Another adapter cannot use the prefix that is cached for this one, so the whole conversation is computed anew. And what
a follow-up says ("shorter, please") is weak evidence. Near-ties are settled alike: for the expert that is loaded.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cachetools import TTLCache

from adapters_registry.expert import Expert
from router.decision import Decision
from router.method import Standing
from router.text import content_text
from serving import metrics

#: Turns that are remembered, and for how long (seconds).
CAPACITY = 20_000
LIFETIME = 3600.0
#: Characters of a token, about.
CHARACTERS = 4
#: Conversations longer than this are hashed in a thread (characters).
LONG = 256 * 1024
#: How often in a row an expert is passed over for one that is loaded.
PATIENCE = 3


@dataclass(frozen=True, slots=True)
class Turn:
    """A request as part of a conversation.

    key      names all of it: the next turn begins with it
    earlier  names its beginnings that an answer followed, the longest first: one of them was the previous request
    tokens   how long the longest of them is with that answer, about
    """

    key: str
    earlier: tuple[str, ...] = ()
    tokens: int = 0


class Conversations:
    """Who answered the latest turns of every conversation; for one event loop.

    A conversation is recognised by its own beginning, which the client sends again with every turn: a tenant's request
    that begins with all of an earlier one of the same tenant, and goes on with an answer, is its next turn. Nobody can
    name another's conversation, and nothing but a hash of it is kept.
    """

    def __init__(
        self, stickiness: float, active: Callable[[str], Expert | None], standing: Callable[[str], Standing]
    ) -> None:
        """`stickiness` is the log-odds by which another decision must be better, 0 to forget conversations at once;
        `active` finds the version of an expert's name that is served, `standing` what a method's scores mean."""
        self._stickiness = stickiness
        self._active = active
        self._standing = standing
        self._answered: TTLCache[str, Decision] = TTLCache(CAPACITY, LIFETIME)

    async def turn(self, model: str, body: Mapping[str, Any], tenant: str | None) -> Turn | None:
        """The request's place in a conversation; None for what is no chat."""
        return await turn_of(model, body, tenant) if self._stickiness else None

    def before(self, turn: Turn | None) -> Decision | None:
        """What was decided at the previous turn; None at the first."""
        for key in turn.earlier if turn else ():
            if (decision := self._answered.get(key)) is not None:
                return decision
        return None

    def remember(self, turn: Turn | None, decision: Decision) -> None:
        if turn is not None:
            self._answered[turn.key] = decision.model_copy(update={"candidates": (), "reason": ""})

    def settled(
        self, turn: Turn, before: Decision, fresh: Decision, tenant: str | None, limit: int | None = None
    ) -> Decision:
        """The decision for this turn: the previous one, or the fresh one where that is better by the margin.

        `fresh` lists every candidate, the answer the best `limit` of them.
        """
        outcome, decision = self._settled(turn, before, fresh, tenant)
        metrics.TURNS.labels(outcome).inc()
        return decision.model_copy(update={"candidates": decision.candidates[:limit]})

    def _settled(self, turn: Turn, before: Decision, fresh: Decision, tenant: str | None) -> tuple[str, Decision]:
        who = described(before)
        for each in before.experts:
            expert = self._active(each.expert)
            if expert is None or expert.id != each.id or not expert.visible_to(tenant):
                return "gone", _because(fresh, f"{each.expert}, which answered so far, no longer does")
        if _answer(before) == _answer(fresh):
            return "same", fresh
        gain = gain_of(before, fresh, self._standing(fresh.method))
        cost = f"about {turn.tokens} tokens of cached prefix"
        if gain > self._stickiness:
            what = "it can be scored no more" if math.isinf(gain) else f"{described(fresh)} gains {gain:.2f}"
            return "switched", _because(fresh, f"not kept from the conversation: {who}; {what}, at the cost of {cost}")
        why = f"the new best, {described(fresh)}, would gain {gain:.2f} (margin {self._stickiness:g})"
        if fresh.kind == "base":
            why = "no expert is near enough to this turn alone"
        kept = fresh.model_copy(
            update={
                **_answer(before),
                "confidence": fresh.confidence * math.exp(-max(gain, 0.0)),
                "reason": f"kept from the conversation: {who}; {why}; a switch would lose {cost}",
            }
        )
        return "kept", kept


class NearTies:
    """Experts that are nearly as good, and loaded already; for one event loop."""

    def __init__(
        self,
        margin: float,
        loaded: Callable[[], frozenset[str]],
        active: Callable[[str], Expert | None],
        standing: Callable[[str], Standing],
    ) -> None:
        """`margin` is the log-odds within which two experts are as good as each other."""
        self._margin = margin
        self._loaded = loaded
        self._active = active
        self._standing = standing
        self._passed: Counter[str] = Counter()  # how often in a row, by expert

    def settled(self, decision: Decision) -> Decision:
        """The best expert, or the best loaded one among those within the margin that reach their own thresholds.

        After PATIENCE requests in a row an expert that is not loaded answers all the same, and is loaded for it.
        """
        if not self._margin or decision.kind != "select" or len(decision.candidates) < 2:
            return decision
        best, loaded = decision.candidates[0], self._loaded()
        if best.expert != decision.experts[0].expert or decision.experts[0].id in loaded:
            self._passed.pop(best.expert, None)
            return decision
        standing = self._standing(decision.method)
        for each in decision.candidates[1:]:
            gap = (best.score - each.score) / standing.temperature
            expert = self._active(each.expert)
            if gap > self._margin or self._passed[best.expert] >= PATIENCE:
                break
            if (
                expert is None
                or expert.id not in loaded
                or each.score < standing.thresholds.get(each.expert, -math.inf)
            ):
                continue
            self._passed[best.expert] += 1
            metrics.NEAR_TIES.inc()
            why = f"{best.expert} is better by {gap:.2f} (a near-tie, within {self._margin:g}), but not loaded"
            answer = decision.experts[0].model_copy(update={"expert": expert.name, "id": expert.id})
            changed = {"experts": (answer,), "confidence": decision.confidence * math.exp(-gap)}
            return _because(decision.model_copy(update=changed), why)
        self._passed.pop(best.expert, None)
        return decision


async def turn_of(model: str, body: Mapping[str, Any], tenant: str | None) -> Turn | None:
    """The request's place in a conversation; None when it has no messages.

    Only roles and texts count: clients move other things about from turn to turn (`cache_control`).
    """
    messages = next((body[key] for key in ("messages", "input") if isinstance(body.get(key), list)), None)
    if not messages or not all(isinstance(each, dict) for each in messages):
        return None
    told = (json.dumps([tenant, model]), content_text(body.get("system")), content_text(body.get("instructions")))
    said = [(f"{each.get('role')} {each.get('type')}", content_text(each.get("content"))) for each in messages]
    answers = [at for at, each in enumerate(messages) if each.get("role") == "assistant"]
    if sum(len(text) for _, text in said) < LONG:
        keys = hashes(told, *said)
    else:
        keys = await asyncio.to_thread(hashes, told, *said)
    last = answers[-1] if answers else 0
    length = sum(map(len, told[1:])) + sum(len(text) for _, text in said[: last + 1])  # the answer is cached as well
    return Turn(keys[-1], tuple(reversed(keys[1 : last + 1])), length // CHARACTERS)


def hashes(*parts: tuple[str, ...]) -> list[str]:
    """(n parts) -> (n,) what names the first, the first two, ... of them; no two lists have a name in common."""
    running, found = hashlib.sha256(), []
    for part in parts:
        for text in part:
            data = text.encode(errors="surrogatepass")
            running.update(b"%d:" % len(data))
            running.update(data)
        found.append(running.hexdigest())
    return found


def gain_of(before: Decision, fresh: Decision, standing: Standing) -> float:
    """By how many log-odds the fresh decision is better than the previous one, for this turn's prompt.

    The base model has the score of the best expert's threshold. That no expert reaches its own is no evidence against
    the one that answered so far: the gain is 0. It is infinite when that one cannot be scored at all.
    """
    if fresh.kind == "base" or not fresh.candidates:
        return 0.0
    best = fresh.candidates[0].score
    if before.kind == "base":
        return math.inf if fresh.threshold is None else (best - fresh.threshold) / standing.temperature
    members = {each.expert for each in before.experts if each.weight}
    known = [each.score for each in fresh.candidates if each.expert in members]
    return (best - max(known)) / standing.temperature if known else math.inf


def described(decision: Decision) -> str:
    return " + ".join(each.expert for each in decision.experts if each.weight) or "the base model"


def _answer(decision: Decision) -> dict[str, Any]:
    """The fields that say who answers, and how."""
    return {
        "kind": decision.kind,
        "experts": decision.experts,
        "operator": decision.operator,
        "operator_settings": decision.operator_settings,
        "gate": decision.gate,
        "gate_settings": decision.gate_settings,
        "verdict": decision.verdict,
        "general": decision.general,
        "compress": decision.compress,
    }


def _because(decision: Decision, reason: str) -> Decision:
    return decision.model_copy(update={"reason": "; ".join(filter(None, (decision.reason, reason)))})
