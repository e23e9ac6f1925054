"""What becomes of answers: the router's decisions are kept, behind the requests, so that users can judge them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adapters_registry.errors import RegistryError
from adapters_registry.feedback import Decided, Decisions
from adapters_registry.models import now
from router.decision import Decision
from router.errors import RouterError
from router.router import Router
from serving import metrics
from serving.config import FeedbackSettings

logger = logging.getLogger("moerge")

#: Decisions that wait to be written; more are not kept.
QUEUE = 4096
#: How long decisions are gathered before they are written together (seconds).
PAUSE = 0.25
#: How often old ones are deleted (seconds).
TIDY = 300.0


@dataclass(frozen=True, slots=True)
class Waiting:
    decision: Decision
    text: str
    tenant: str | None
    router: int


class Feedback:
    """Keeps decisions and takes judgements of them; for one event loop, which it never holds up."""

    def __init__(self, settings: FeedbackSettings, decisions: Decisions, router: Router) -> None:
        self._settings = settings
        self._decisions = decisions
        self._router = router
        self._waiting: deque[Waiting] = deque()
        self._arrived = asyncio.Event()
        self._writing = asyncio.Lock()
        self._tidied = 0.0

    def record(self, decision: Decision, text: str, tenant: str | None) -> None:
        """Have a decision kept: soon, or not at all when too many wait."""
        if not self._settings.keep:
            return
        if len(self._waiting) >= QUEUE:
            metrics.DECISIONS.labels("dropped").inc()
            return
        self._waiting.append(Waiting(decision, text, tenant, self._router.learned.number))
        self._arrived.set()

    async def run(self) -> None:
        """Write what waits, until cancelled."""
        while True:
            await self._arrived.wait()
            await asyncio.sleep(PAUSE)
            await self.flush()
            await self._tidy()

    async def flush(self) -> None:
        """Write all that waits now."""
        async with self._writing:
            self._arrived.clear()
            batch = [self._waiting.popleft() for _ in range(len(self._waiting))]
            if not batch:
                return
            try:
                vectors = [await self._vector(each.text) for each in batch]
                await asyncio.to_thread(self._write, batch, vectors)
                metrics.DECISIONS.labels("kept").inc(len(batch))
            except Exception as error:  # whatever it is, requests go on
                metrics.DECISIONS.labels("failed").inc(len(batch))
                logger.warning("%d decisions are not kept: %s", len(batch), error)

    async def rate(self, decision: str, score: float, comment: str | None, tenant: str | None) -> Decided:
        """Take a judgement. Raises DecisionNotFound."""
        await self.flush()  # it may be of a moment ago
        rated = await asyncio.to_thread(self._decisions.rate, decision, score, comment=comment, tenant=tenant)
        metrics.FEEDBACK.labels("good" if score > 0.5 else "bad" if score < 0.5 else "neutral").inc()
        return rated

    async def _vector(self, text: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        with contextlib.suppress(RouterError):
            if text:
                return await self._router.vector(text)  # encoded a moment ago, and remembered
        return np.zeros(0, np.float32)

    def _write(self, batch: Sequence[Waiting], vectors: Sequence[np.ndarray]) -> None:
        self._decisions.add(
            [
                Decided(
                    id=each.decision.id,
                    at=now(),
                    tenant=each.tenant,
                    method=each.decision.method,
                    kind=each.decision.kind,
                    experts=[who.model_dump() for who in each.decision.experts],
                    candidates=[{"expert": who.expert, "score": who.score} for who in each.decision.candidates],
                    confidence=each.decision.confidence,
                    router=each.router,
                    encoder=self._router.encoder_id,
                    vector=vector,
                    text=each.text.encode(errors="replace").decode() if self._settings.keep_text else None,
                )
                for each, vector in zip(batch, vectors, strict=True)
            ]
        )

    async def _tidy(self) -> None:
        if time.monotonic() - self._tidied > TIDY:
            self._tidied = time.monotonic()
            with contextlib.suppress(RegistryError):
                await asyncio.to_thread(self._decisions.forget, self._settings.keep, self._settings.days)
