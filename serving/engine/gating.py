"""Composites in one step of the engine: what their gates need to know, and their call between shrink and expand."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from router.gating.gate import NOTHING, Gate, Step, Table
from serving.engine import Trace, trace
from serving.engine.batch import WEIGHTS, Batch, Request
from serving.engine.evidence import BlockEvidence
from serving.engine.slots import SlotAdapter

logger = logging.getLogger("moerge.engine")

LARGEST = 1e6  # a weight above this is a mistake, and might overflow in half precision


class Spread(NamedTuple):
    """Of a token's whole input x: Euclidean length and biased standard deviation, (t, 1, 1) each."""

    length: Tensor
    spread: Tensor


def spread_of(x: Tensor) -> Spread:
    """x (t, d_in)"""
    x = x.float()
    length = torch.linalg.vector_norm(x, dim=-1)
    spread = torch.linalg.vector_norm(x - x.mean(-1, keepdim=True), dim=-1) / x.shape[-1] ** 0.5  # x.std is slow
    return Spread(length[:, None, None], spread[:, None, None])


def spread_of_shares(x: Tensor, d_in: int, all_reduce: Callable[[Tensor], Tensor]) -> Spread:
    """The same where every rank has a share x (t, d_in / ranks) of the input; `all_reduce` adds over the ranks."""
    x = x.float()
    total, squares = all_reduce(torch.stack([x.sum(-1), x.square().sum(-1)]))
    variance = all_reduce((x - total[:, None] / d_in).square().sum(-1)) / d_in
    return Spread(squares.sqrt()[:, None, None], variance.sqrt()[:, None, None])


class SlotStep:
    """One composite's requests in one step: `gate_` is called once per group, in the order of computation."""

    def __init__(self, adapter: SlotAdapter, requests: Sequence[Request], gates: Gates, batch: Batch) -> None:
        assert adapter.gate is not None
        assert adapter.layout is not None
        self._gate = gate = adapter.gate
        K = len(adapter.layout.members)
        self._tokens = sum(request.tokens for request in requests)
        self.evidence = gates.evidence.step(requests, batch, K) if gate.stateful else None
        given = given_weights(requests, gate, K) if gate.takes_weights else None
        self._step = NOTHING
        if given is not None or self.evidence is not None:
            self._step = Step(given=given, evidence=self.evidence)
        self.needs_spread = gate.needs_length or gate.needs_spread
        self.traced = []
        start = 0
        for request in requests:
            if request.arguments and (found := gates.tracer.open(request, adapter.names, adapter.groups, K, start)):
                self.traced.append(found)
            start += request.tokens

    def gate_(self, z: Tensor, table: Table, d_in: int, spread: Spread | None) -> None:
        """Multiply z (t, n, R) by the gate's weights, in place; `spread` of x when `needs_spread`."""
        step = self._step
        if spread is not None:
            step = Step(spread.length, spread.spread, step.given, step.evidence, d_in)
        if not self.traced:
            self._gate(z, table, step)
            return
        trace.note(self.traced, self._gate, z, table, step)
        trace.weigh(self.traced, self._gate(z, table, step), table.index)

    def close(self) -> None:
        """After the last group."""
        if self.evidence is not None:
            self.evidence.store()
        trace.close(self.traced, self.evidence)


class Gates:
    """The composites of one worker: which slots hold one, the step at hand, evidence and traces."""

    def __init__(self, groups: int) -> None:
        self.evidence = BlockEvidence(groups)
        self.tracer = trace.Tracer()
        self.composites: dict[int, SlotAdapter] = {}  # by slot
        self._steps: dict[int, SlotStep] = {}

    def set_slot(self, slot: int, adapter: SlotAdapter | None) -> None:
        self.close()
        if adapter is None or adapter.gate is None:
            self.composites.pop(slot, None)
        else:
            self.composites[slot] = adapter

    @torch.inference_mode()
    def begin(self, batch: Batch) -> None:
        """The requests of the coming step; the one before is over."""
        self.close()
        by_slot: dict[int, list[Request]] = {}
        for request in batch.requests:
            by_slot.setdefault(request.slot, []).append(request)
        for slot, requests in by_slot.items():
            self._steps[slot] = SlotStep(self.composites[slot], requests, self, batch)

    @torch.inference_mode()
    def close(self) -> None:
        """End the step at hand. Its results are read at the earliest by what comes after it."""
        if not self._steps:
            return
        steps, self._steps = self._steps, {}
        for step in steps.values():
            step.close()

    @torch.inference_mode()
    def trace(self, key: str) -> Trace | None:
        """What the request traced under `key` left so far, once."""
        self.close()
        return self.tracer.pop(key)

    def step(self, slot: int) -> SlotStep | None:
        """What the composite in `slot` has to do in this step; None in the engine's own dry runs."""
        return self._steps.get(slot)


def given_weights(requests: Sequence[Request], gate: Gate, K: int) -> Tensor | None:
    """(t, K) the weights that requests brought along, NaN for those that brought none; None when no one did."""
    brought = [_checked(request, gate, K) for request in requests]
    if not any(brought):
        return None
    rows = torch.tensor([weights or [math.nan] * K for weights in brought])
    return rows.repeat_interleave(torch.tensor([request.tokens for request in requests]), 0)


def _checked(request: Request, gate: Gate, K: int) -> list[float] | None:
    """Weights that the gate can use; anything else is ignored, because an exception here would end the engine."""
    weights: Any = request.arguments.get(WEIGHTS)
    if weights is None:
        return None
    good = isinstance(weights, list | tuple) and len(weights) == K
    good = good and all(isinstance(weight, int | float) and abs(weight) < LARGEST for weight in weights)
    if good and gate.stateful:  # a prior
        good = min(weights) >= 0 and max(weights) > 0
    if not good:
        if request.computed == 0:  # once, not in every step
            logger.warning("Request %s: %s=%r is not %d usable weights; ignored.", request.id, WEIGHTS, weights, K)
        return None
    return [float(weight) for weight in weights]
