"""The evidence gate and the probe against the sum over tokens and modules that defines them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from router.gating import gate_of
from router.gating.gate import Step, Table
from router.gating.layout import Layout, Member

NAN = float("nan")


@dataclass
class Request:
    """Evidence of one request whose tokens come in chunks: `carry` is what earlier chunks left, group by group."""

    carry: dict[int, Tensor] = field(default_factory=dict)
    so_far: Tensor | None = None

    def begin(self) -> Request:
        self.so_far = None
        return self

    def add(self, index: int, score: Tensor) -> Tensor:
        mine = score.cumsum(0) + self.carry.get(index, torch.zeros(score.shape[-1]))  # (t, K) this group alone
        self.carry[index] = mine[-1]
        self.so_far = mine if self.so_far is None else self.so_far + mine
        return self.so_far


SCORES = [
    {"score": "spectr"},
    {"score": "arrow"},
    {"score": "smile", "k_gate": 2},
    {"score": "smile", "centred": True},
    {"score": "spectr", "normalise": "unit"},
]


@pytest.mark.parametrize("settings", SCORES, ids=str)
def test_evidence_is_the_sum_of_what_was_seen(
    settings: dict[str, Any], workshop: Any, make_raw: Any, make_twin: Any
) -> None:
    modules = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    experts = [make_raw(0, 4), make_raw(1, [3, 2], modules[:2], rslora=True), make_raw(2, 2)]
    neutral = torch.randn(30, 24, generator=torch.Generator().manual_seed(9)).double()
    settings = {"normalise": "zscore", **settings}
    gate = settings["score"]
    plain = {name: value for name, value in settings.items() if name != "score"}
    twin = make_twin(experts, modules, neutral)
    stored = workshop.statistics(twin, gate, plain)
    engine = workshop.engine(experts, "evidence", {**settings, "beta": 0.4}, stored)
    x = torch.randn(7, 24, generator=torch.Generator().manual_seed(1))
    given = torch.tensor([0.7, 0.2, 0.1]).expand(7, 3).clone()
    weights, outputs = engine(x, given=given, evidence=Request())
    total = [0.0, 0.0, 0.0]
    for t, token in enumerate(x.double()):
        for row in twin.scores(gate, plain, token):
            total = [sum_ + (score or 0.0) for sum_, score in zip(total, row, strict=True)]
        logits = [math.log(prior) + 0.4 * sum_ for prior, sum_ in zip((0.7, 0.2, 0.1), total, strict=True)]
        expected = torch.tensor(logits, dtype=torch.float64).softmax(0).expand(3, 3)
        torch.testing.assert_close(weights[t].double(), expected, atol=1e-4, rtol=0)
        for j, right in enumerate(twin.output(expected, token)):
            torch.testing.assert_close(outputs[j][t].double(), right, atol=1e-3, rtol=1e-3)


def _gate(name: str, **settings: Any) -> Any:
    members = tuple(Member(id=str(k), rows=2) for k in range(3))
    return gate_of(Layout(gate=name, members=members, settings={"normalise": "none", **settings}))


def _tables(gate: Any) -> list[Table]:
    return [Table(index, gate.layout) for index in range(4)]


@pytest.mark.parametrize("cuts", [(9,), (1,) * 9, (4, 5), (2, 6, 1)])
def test_the_answer_does_not_depend_on_how_a_request_is_cut(cuts: tuple[int, ...]) -> None:
    gate = _gate("evidence")
    z = torch.randn(4, 9, 2, 6, generator=torch.Generator().manual_seed(0))  # groups, tokens, modules, rows

    def run(cuts: tuple[int, ...]) -> Tensor:
        request, start, found = Request(), 0, []
        for size in cuts:
            step = Step(evidence=request.begin())
            chunk = [gate(z[g, start : start + size].clone(), table, step) for g, table in enumerate(_tables(gate))]
            found.append(torch.stack(chunk))
            start += size
        return torch.cat(found, 1)

    torch.testing.assert_close(run(cuts), run((9,)), atol=1e-5, rtol=1e-5)


def test_the_future_does_not_matter() -> None:
    gate = _gate("evidence")
    z = torch.randn(5, 1, 6)
    changed = torch.cat([z[:3], torch.randn(2, 1, 6)])
    first, second = (gate(each.clone(), Table(0, gate.layout), Step(evidence=Request())) for each in (z, changed))
    torch.testing.assert_close(first[:3], second[:3])
    assert not torch.equal(first[3:], second[3:])


def test_without_evidence_the_prior_decides() -> None:
    gate = _gate("evidence")
    given = torch.tensor([[0.6, 0.3, 0.1], [NAN] * 3, [1.0, 0.0, 0.0]])
    step = Step(evidence=Request(), given=given)
    weights = gate(torch.zeros(3, 1, 6), Table(0, gate.layout), step)
    torch.testing.assert_close(weights[:, 0], torch.tensor([[0.6, 0.3, 0.1], [1 / 3] * 3, [1.0, 0.0, 0.0]]))


def test_only_the_best_answer_when_top_k_is_set() -> None:
    gate = _gate("evidence", top_k=1)
    z = torch.tensor([[1.0, 0, 3.0, 0, 2.0, 0]]).unsqueeze(1)
    weights = gate(z, Table(0, gate.layout), Step(evidence=Request()))
    assert weights.flatten().tolist() == [0.0, 1.0, 0.0]
    assert z.flatten().tolist() == [0.0, 0.0, 3.0, 0.0, 0.0, 0.0]


def test_a_probe_gathers_the_same_evidence_and_lets_the_base_model_answer() -> None:
    z = torch.randn(5, 2, 6)
    seen = []
    for name in ("evidence", "probe"):
        gate, request, mine = _gate(name), Request(), z.clone()
        weights = gate(mine, Table(0, gate.layout), Step(evidence=request))
        seen.append(request.carry[0])
    torch.testing.assert_close(seen[0], seen[1])
    torch.testing.assert_close(gate.raw(z, Table(0, gate.layout), Step()).sum((0, 1)), seen[1])
    assert not mine.any()
    assert weights.shape == (5, 2, 3)
    assert not weights.any()
