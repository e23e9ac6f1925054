"""The prefill probe: the prompt is read once by the base model, with the experts looking on, before one is chosen."""

from __future__ import annotations

import time
import uuid
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.decision import Candidate, Decision, Weighted
from router.gating import GATES
from serving.internal import ONE_TOKEN, one_token, post
from serving.service import Service
from serving.traces import trace_of


async def probe(
    service: Service,
    path: str,
    body: dict[str, Any],
    decision: Decision,
    *,
    trace: bool = False,
    tenant: str | None = None,
) -> Decision:
    """Who answers, by the evidence E in the prompt: p = softmax(log prior + beta E), the decision's weights the prior.

    Where the engine cannot read the prompt alone, retrieval's best expert answers; the request itself then tells
    the client what is wrong with it. `trace` keeps what was read, for `tenant`. Raises what `service.hold` raises.
    """
    assert decision.verdict is not None
    started = time.perf_counter()
    found = None
    if path in ONE_TOKEN:
        key = f"probe-{uuid.uuid4().hex}"
        async with service.hold(decision) as name:
            arguments = {"moerge_trace": key, "moerge_collect": "evidence"}
            response = await post(service.engine, path, one_token(path, body, name, arguments))
            found = await service.engine.trace(key)
        if response.status_code != 200 or found is None or not np.isfinite(found.evidence).all():
            found = None
    if found is None:
        return nearest(decision, "the prompt's evidence could not be read; retrieval decides")
    took = (time.perf_counter() - started) * 1e3
    decided = judged(service, decision, found.evidence.astype(np.float64))
    timings = {**decision.timings, "probe": took, "total": decision.timings.get("total", 0.0) + took}
    decided = decided.model_copy(update={"timings": timings})
    if trace and decided.kind == "select":
        service.traces.put(tenant, trace_of(f"auto:{decision.method}", decided, decision, found))
    return decided


def judged(service: Service, decision: Decision, evidence: NDArray[np.float64]) -> Decision:
    """The decision that follows from the members' evidence (K,)."""
    assert decision.verdict is not None
    prior = np.array([each.weight for each in decision.experts])
    with np.errstate(divide="ignore"):  # weight 0: out of the question
        logits = np.log(prior) + decision.verdict.beta * evidence
    p = np.exp(logits - logits.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    experts = decision.experts
    candidates = tuple(
        Candidate(expert=experts[k].expert, version=service.expert(experts[k].id).version, score=float(evidence[k]))
        for k in order
        if prior[k] > 0
    )
    common = {"candidates": candidates, "confidence": float(p.max()), "threshold": None, "verdict": None}
    if decision.verdict.blend:
        mixed = tuple(each.model_copy(update={"weight": float(w)}) for each, w in zip(experts, p, strict=True))
        settings = GATES["constant"].Settings().model_dump(mode="json")
        return decision.model_copy(update={**common, "experts": mixed, "gate": "constant", "gate_settings": settings})
    return decision.model_copy(update={**common, **selected(experts[order[0]])})


def nearest(decision: Decision, reason: str) -> Decision:
    """Retrieval's best, or without retrieval the member with the largest weight."""
    names = {each.expert: each for each in decision.experts}
    first = next((names[each.expert] for each in decision.candidates if each.expert in names), None)
    first = first or max(decision.experts, key=lambda each: each.weight)
    return decision.model_copy(update={**selected(first), "verdict": None, "reason": reason})


def selected(expert: Weighted) -> dict[str, Any]:
    one = (expert.model_copy(update={"weight": 1.0}),)
    return {"kind": "select", "experts": one, "gate": None, "gate_settings": {}, "general": None, "compress": None}
