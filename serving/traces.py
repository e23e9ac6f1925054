"""Which experts each layer and token used, for the requests that asked: kept for a while, for their caller."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from pydantic import BaseModel

from router.decision import Decision
from serving import engine

#: Traces that are kept; the oldest go.
CAPACITY = 1024
#: How long somebody waits for the trace of a request that is still being answered (seconds): the end of a stream
#: is seen before the engine has been asked what it left.
PATIENCE = 10.0


class Trace(BaseModel):
    """experts   members of the composite, in the order of the columns
    groups    modules that share an input, in the order of computation; weights (groups, experts) their mean weights
    top       for each token that was computed, the expert with the largest weight, as a column
    evidence  (experts) all evidence after the last token; zeros for gates that keep none
    """

    object: Literal["trace"] = "trace"
    id: str
    model: str
    decision: Decision
    gate: str
    experts: list[str]
    tokens: int
    groups: list[str]
    weights: list[list[float]]
    top: list[int]
    evidence: list[float]


def trace_of(model: str, decision: Decision, gated: Decision, found: engine.Trace) -> Trace:
    """`gated` is the decision that the engine traced: a probe's, when `decision` is what followed from it."""
    assert gated.gate is not None
    return Trace(
        id=decision.id,
        model=model,
        decision=decision,
        gate=gated.gate,
        experts=[each.expert for each in gated.experts],
        tokens=found.tokens,
        groups=list(found.groups),
        weights=found.weights.tolist(),
        top=found.top.tolist(),
        evidence=found.evidence.tolist(),
    )


class Traces:
    """The latest traces by decision, each with the tenant that it belongs to."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._capacity = capacity
        self._traces: OrderedDict[str, tuple[str | None, Trace]] = OrderedDict()
        self._expected: dict[str, asyncio.Event] = {}

    @contextmanager
    def expected(self, decision_id: str) -> Iterator[None]:
        """The request is being answered: whoever asks for its trace meanwhile waits a little."""
        done = self._expected[decision_id] = asyncio.Event()
        try:
            yield
        finally:
            del self._expected[decision_id]
            done.set()

    def put(self, tenant: str | None, trace: Trace) -> None:
        self._traces[trace.id] = (tenant, trace)
        while len(self._traces) > self._capacity:
            self._traces.popitem(last=False)

    def __contains__(self, decision_id: str) -> bool:
        return decision_id in self._traces

    async def wait(self, decision_id: str, tenant: str | None) -> Trace | None:
        """`get`, once the request has been answered, or after PATIENCE."""
        if (done := self._expected.get(decision_id)) is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(done.wait(), PATIENCE)
        return self.get(decision_id, tenant)

    def get(self, decision_id: str, tenant: str | None) -> Trace | None:
        """None also for another tenant's; the operator (None) may see all."""
        owner, trace = self._traces.get(decision_id, (None, None))
        return trace if tenant is None or tenant == owner else None
