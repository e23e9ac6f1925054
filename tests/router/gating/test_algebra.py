"""What must hold for any buffer and any experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from router.gating import GATES, gate_of
from router.gating.blocks import Blocks
from router.gating.gate import Gate, Step, Table, top_softmax
from router.gating.layout import Layout, Member
from router.lowrank import Factors, svd

SOFTMAX = ["arrow", "spectr", "smile", "phatgoose", "meteora", "lag"]
blocks = st.lists(st.integers(1, 4), min_size=2, max_size=5)
seeds = st.integers(0, 2**31)
quick = settings(max_examples=25, deadline=None, derandomize=True)


def make(gate: str, rows: list[int], **chosen: Any) -> tuple[Gate, Table]:
    extra = len(rows) if GATES[gate].extra else 0
    members = tuple(Member(id=str(k), rows=r) for k, r in enumerate(rows))
    layout = Layout(gate=gate, members=members, extra=extra, settings=chosen)
    return gate_of(layout), Table(0, layout, scale=torch.ones(2, layout.rank))


def buffer(layout: Layout, seed: int, tokens: int = 4) -> Tensor:
    return torch.randn(tokens, 2, layout.rank, generator=torch.Generator().manual_seed(seed))


STEP = Step(spread=torch.ones(1, 1, 1))


@quick
@given(rows=blocks, seed=seeds, name=st.sampled_from(SOFTMAX), top_k=st.sampled_from([1, 2, 9]))
def test_the_weights_of_a_token_sum_to_one(rows: list[int], seed: int, name: str, top_k: int) -> None:
    gate, table = make(name, rows, top_k=top_k)
    weights = gate(buffer(table.layout, seed), table, STEP)
    torch.testing.assert_close(weights.sum(-1), torch.ones(4, 2))
    assert int((weights > 0).sum(-1).max()) <= min(top_k, len(rows))


@quick
@given(rows=blocks, seed=seeds, name=st.sampled_from(["arrow", "spectr", "smile", "lag"]))
def test_flipping_the_sign_of_a_direction_changes_nothing(rows: list[int], seed: int, name: str) -> None:
    gate, table = make(name, rows, top_k=2)
    z = buffer(table.layout, seed)
    signs = torch.randn(table.layout.rank, generator=torch.Generator().manual_seed(seed)).sign()
    flipped = z * signs
    torch.testing.assert_close(gate(z, table, STEP), gate(flipped, table, STEP))
    torch.testing.assert_close(z, flipped * signs)


@quick
@given(rows=blocks, seed=seeds, name=st.sampled_from([*SOFTMAX, "hilora"]), data=st.data())
def test_permuting_the_experts_permutes_the_weights(rows: list[int], seed: int, name: str, data: Any) -> None:
    order = data.draw(st.permutations(range(len(rows))))
    gate, table = make(name, rows)
    other, permuted = make(name, [rows[k] for k in order])
    z = buffer(table.layout, seed)
    pieces = z[..., : sum(rows)].split(rows, -1)
    extra = [z[..., sum(rows) :][..., order]] if table.layout.extra else []
    moved = torch.cat([*(pieces[k] for k in order), *extra], -1)
    torch.testing.assert_close(gate(z, table, STEP)[..., order], other(moved, permuted, STEP))


@quick
@given(seed=seeds, factor=st.floats(0.1, 10))
def test_the_length_of_the_input_does_not_matter_when_normalised(seed: int, factor: float) -> None:
    for name in ("arrow", "spectr", "smile"):
        for normalise in ("unit", "rms"):
            gate, table = make(name, [2, 3], normalise=normalise)
            z = buffer(table.layout, seed)
            one = gate(z.clone(), table, Step(length=torch.full((4, 1, 1), 3.0), d_in=7))
            two = gate(z * factor, table, Step(length=torch.full((4, 1, 1), 3.0 * factor), d_in=7))
            torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


@quick
@given(rows=blocks, seed=seeds)
def test_weights_scale_blocks_and_leave_extra_rows_alone(rows: list[int], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    total, K = sum(rows), len(rows)
    z, weights = torch.randn(3, 2, total + K, generator=random), torch.randn(3, 2, K, generator=random)
    slow = z.clone()
    for k in range(K):
        start = sum(rows[:k])
        for j in range(rows[k]):
            slow[..., start + j] = z[..., start + j] * weights[..., k]
    Blocks(rows).multiply(z, weights)
    torch.testing.assert_close(z, slow)


@quick
@given(rows=blocks, seed=seeds, measured=st.sampled_from([None, 1, 2, 8]))
def test_views_of_a_buffer_give_what_a_loop_gives(rows: list[int], seed: int, measured: int | None) -> None:
    z = torch.randn(2, 3, sum(rows) + len(rows), generator=torch.Generator().manual_seed(seed))
    made = Blocks(rows, measured=measured)
    parts = z[..., : sum(rows)].split(rows, -1)
    torch.testing.assert_close(made.norms(z), torch.stack([part[..., :measured].norm(dim=-1) for part in parts], -1))
    torch.testing.assert_close(made.first_rows(z), torch.stack([part[..., 0] for part in parts], -1))
    torch.testing.assert_close(made.extra_rows(z), z[..., sum(rows) :])


def test_a_buffer_with_modules_first_in_memory_is_changed_in_place() -> None:
    gate, table = make("arrow", [3, 3])
    memory = torch.randn(2, 5, 6)  # modules, tokens, rows: how a kernel may lay it out
    z = memory.transpose(0, 1)
    expected = z.clone()
    weights = gate(z, table)
    torch.testing.assert_close(memory.transpose(0, 1), expected * weights.repeat_interleave(3, -1))


@quick
@given(seed=seeds, r=st.integers(1, 6))
def test_a_rotation_of_the_factors_changes_nothing(seed: int, r: int) -> None:
    random = torch.Generator().manual_seed(seed)
    B, A = torch.randn(9, r, generator=random), torch.randn(r, 11, generator=random)
    Q = torch.linalg.qr(torch.randn(r, r, generator=random).double()).Q
    one, two = svd(Factors(B, A)), svd(Factors(B.double() @ Q, Q.mT @ A.double()))
    torch.testing.assert_close(one.S, two.S, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        one.U @ torch.diag(one.S) @ one.Vt, two.U @ torch.diag(two.S) @ two.Vt, atol=1e-4, rtol=1e-4
    )


def test_of_equal_scores_exactly_top_k_answer() -> None:
    weights = top_softmax(torch.ones(2, 3, 5), 2)
    assert ((weights > 0).sum(-1) == 2).all()
    assert set(weights.flatten().tolist()) == {0.0, 0.5}
    gate, table = make("lag", [1, 1, 1], top_k=2)
    weights = gate(torch.ones(2, 2, 3), table)
    assert ((weights == 1).sum(-1) == 1).all()


def test_a_layout_refuses_what_contradicts_itself() -> None:
    a, b = Member(id="a", rows=1), Member(id="b", rows=2)
    with pytest.raises(ValidationError, match="occurs twice: a, a"):
        Layout(gate="arrow", members=(a, a))
    with pytest.raises(ValidationError, match="1 extra rows for 2 members"):
        Layout(gate="arrow", members=(a, b), extra=1)
    with pytest.raises(ValidationError):
        Layout(gate="arrow", members=(a,))
    layout = Layout(gate="arrow", members=(a, b), extra=2)
    assert (layout.rank, layout.blocks, layout.starts) == (5, (1, 2), (0, 1))


def test_a_layout_survives_json() -> None:
    layout = Layout(gate="smile", members=(Member(id="a", rows=1), Member(id="b", rows=2)), settings={"k_gate": 3})
    assert Layout.model_validate_json(layout.model_dump_json()) == layout


def test_unknown_gates_and_settings_are_errors() -> None:
    members = (Member(id="a", rows=1), Member(id="b", rows=1))
    with pytest.raises(KeyError):
        gate_of(Layout(gate="nope", members=members))
    with pytest.raises(ValidationError, match="topk"):
        gate_of(Layout(gate="arrow", members=members, settings={"topk": 2}))
