"""Gates that do not compare experts token by token: constant weights, and single directions (HiLoRA)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from router.gating import gate_of
from router.gating.layout import Layout, Member

NAN = float("nan")


def test_a_constant_mixture_is_the_weighted_sum_of_outputs(workshop: Any, make_raw: Any, make_twin: Any) -> None:
    experts = [make_raw(0, 4), make_raw(1, [2, 3, 1], rslora=True), make_raw(2, 5)]
    engine = workshop.engine(experts, "constant", {"weights": [0.5, -1.0, 2.0]})
    x = torch.randn(4, 24, generator=torch.Generator().manual_seed(3))
    weights, outputs = engine(x)
    expected = torch.tensor([0.5, -1.0, 2.0]).expand(4, 3, 3)
    torch.testing.assert_close(weights, expected)
    twin = make_twin(experts, list(experts[0].factors), x)
    for j in range(3):
        right = torch.stack([twin.output(expected[t].double(), x[t].double())[j] for t in range(4)])
        torch.testing.assert_close(outputs[j].double(), right, atol=1e-5, rtol=1e-5)


def test_a_request_may_bring_its_own_weights(workshop: Any, make_raw: Any) -> None:
    engine = workshop.engine([make_raw(0, 2), make_raw(1, 2)], "constant")
    given = torch.tensor([[0.9, 0.1], [NAN, NAN], [0.0, 0.0]])
    weights, outputs = engine(torch.ones(3, 24), given=given)
    assert weights[:, 1].tolist() == [pytest.approx([0.9, 0.1]), [0.5, 0.5], [0.0, 0.0]]
    assert not outputs[0][2].any(), "weights of zero leave the base model"


def test_constant_weights_must_be_one_for_each_member() -> None:
    members = (Member(id="a", rows=1), Member(id="b", rows=1))
    with pytest.raises(ValueError, match="3 weights for 2 members"):
        gate_of(Layout(gate="constant", members=members, settings={"weights": [1, 2, 3]}))
    with pytest.raises(ValueError, match="leave it out"):
        gate_of(Layout(gate="constant", members=members, settings={"weights": []}))
    with pytest.raises(ValueError, match="finite"):
        gate_of(Layout(gate="constant", members=members, settings={"weights": [1.0, NAN]}))


@pytest.mark.parametrize("components", [None, 1, 5, 99])
def test_hilora_keeps_the_directions_that_change_the_output_most(
    components: int | None, workshop: Any, make_raw: Any
) -> None:
    experts = [make_raw(0, 4), make_raw(1, [2, 3, 1], rslora=True), make_raw(2, 3)]
    engine = workshop.engine(experts, "hilora", {"components": components})
    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(4))
    asked = engine.gate.weights(engine.shrink(x), engine.table, engine.step(x))
    shares, outputs = engine(x)
    torch.testing.assert_close(shares, asked)
    for t, token in enumerate(x.double()):
        for j, module in enumerate(experts[0].factors):
            pieces = []  # (length, expert, what the direction adds to the output)
            for k, expert in enumerate(experts):
                U, S, Vh = torch.linalg.svd(expert.delta(module), full_matrices=False)
                for i in range(expert.factors[module][1].shape[0]):
                    added = U[:, i] * S[i] * (Vh[i] @ token)
                    pieces.append((float(added.norm()), k, added))
            pieces.sort(key=lambda piece: -piece[0])
            kept = pieces[: components or 4]
            right = torch.stack([piece[2] for piece in kept]).sum(0)
            torch.testing.assert_close(outputs[j][t].double(), right, atol=1e-5, rtol=1e-5)
            if components in (None, 1, 5):
                counts = torch.tensor([sum(piece[1] == k for piece in kept) for k in range(3)])
                torch.testing.assert_close(shares[t, j], counts / len(kept))
