"""What traced requests leave in a worker, until it is fetched. Requests that ask for no trace cost nothing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from router.gating.gate import Gate, Step, Table
from serving.engine import Trace
from serving.engine.batch import COLLECT, TRACE, Request
from serving.engine.evidence import StepEvidence

#: Traces that are kept for those who never fetch them.
CAPACITY = 256


@dataclass(eq=False)
class Record:
    """A request's trace in the making; `weights (groups, K)` and `moments` are sums over tokens."""

    owner: str
    names: Mapping[int, tuple[str, ...]]
    weights: Tensor
    moments: bool
    top: list[Tensor] = field(default_factory=list)
    tokens: int = 0
    evidence: Tensor | None = None
    sums: dict[int, list[Tensor]] = field(default_factory=dict)  # group: raw score, its square (n, K), z (n, R)


@dataclass(eq=False)
class Traced:
    """Rows of this step that belong to a record; `pending (rows, K)` is each token's total weight so far."""

    record: Record
    rows: slice
    pending: Tensor


class Tracer:
    """The worker's store, least recently started traces first."""

    def __init__(self) -> None:
        self._records: OrderedDict[str, Record] = OrderedDict()

    def open(
        self, request: Request, names: Mapping[int, tuple[str, ...]], groups: int, K: int, start: int
    ) -> Traced | None:
        """The rows of `request` to be traced, which begin at row `start` of its slot's; None: none.

        A token that is computed again, after a preemption, is not traced again.
        """
        key = request.arguments.get(TRACE)
        if not isinstance(key, str):
            return None
        record = self._records.get(key)
        if record is None:
            moments = request.arguments.get(COLLECT) == "moments"
            record = self._records[key] = Record(request.id, names, torch.zeros(groups, K), moments)
            while len(self._records) > CAPACITY:
                self._records.popitem(last=False)
        fresh = request.computed + request.tokens - max(record.tokens, request.computed)
        if record.owner != request.id or fresh <= 0:
            return None
        stop = start + request.tokens
        return Traced(record, slice(stop - fresh, stop), torch.zeros(fresh, K))

    def pop(self, key: str) -> Trace | None:
        """The trace of a request, once."""
        record = self._records.pop(key, None)
        if record is None:
            return None
        K = record.weights.shape[1]
        groups = tuple(group_name(record.names.get(index, ())) for index in range(len(record.weights)))
        return Trace(
            groups=groups,
            tokens=record.tokens,
            weights=(record.weights / max(record.tokens, 1)).numpy(),
            top=(torch.cat(record.top) if record.top else torch.zeros(0, dtype=torch.long)).numpy(),
            evidence=(torch.zeros(K) if record.evidence is None else record.evidence.float()).numpy(),
            moments={name: each.numpy() for name, each in _moments(record).items()},
        )


def group_name(modules: Sequence[str]) -> str:
    """`model.layers.0.self_attn.q_proj+k_proj` for modules that share an input; empty where nothing is adapted."""
    if not modules:
        return ""
    return "+".join([modules[0], *(module.rpartition(".")[2] for module in modules[1:])])


def note(traced: Sequence[Traced], gate: Gate, z: Tensor, table: Table, step: Step) -> None:
    """Before the gate multiplies z (t, n, R): add up moments, for those who ask."""
    wanted = [each for each in traced if each.record.moments]
    if not wanted:
        return
    raw = gate.raw(z, table, step) if hasattr(gate, "raw") else None  # (t, n, K)
    for each in wanted:
        z_part = z[each.rows]
        scores = z_part.new_zeros(*z_part.shape[:2], each.record.weights.shape[1]) if raw is None else raw[each.rows]
        new = [scores.double().sum(0), scores.double().square().sum(0), z_part.double().sum(0)]
        old = each.record.sums.get(table.index)
        each.record.sums[table.index] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]


def weigh(traced: Sequence[Traced], weights: Tensor, index: int) -> None:
    """After the gate: add up weights (t, n, K)."""
    mean = weights.mean(1)  # (t, K)
    for each in traced:
        part = mean[each.rows]
        each.record.weights[index] += part.sum(0)
        each.pending += part


def close(traced: Sequence[Traced], evidence: StepEvidence | None) -> None:
    """After the last group: which expert each token used most, and the evidence so far."""
    for each in traced:
        each.record.top.append(each.pending.argmax(-1))
        each.record.tokens += len(each.pending)
        if evidence is not None:
            each.record.evidence = evidence.total[each.rows.stop - 1]


def _moments(record: Record) -> dict[str, Tensor]:
    moments = {}
    for index, (score, square, z) in record.sums.items():
        for i, module in enumerate(record.names[index]):
            moments[f"{module}.count"] = torch.full_like(score[i], record.tokens)
            moments[f"{module}.score"], moments[f"{module}.square"] = score[i], square[i]
            moments[f"{module}.z"] = z[i]
    return moments
