"""What must hold for any members, and for which operators it does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from router.blending.operator import Share
from router.blending.operators import OPERATORS, operator_of

MakeShares = Callable[..., list[Share]]
MODULE = "model.layers.0.self_attn.q_proj"

#: Settings with which an operator prunes something, and those with which it leaves everything as it is.
PRUNING = {"layer_swap": {"layers": {"x": "7"}}}
NOTHING = {
    **{name: {"density": 1.0} for name, each in OPERATORS.items() if "density" in each.Settings.model_fields},
    "layer_swap": {"layers": {"a": "0"}},
    "breadcrumbs": {"density": 1.0},
}
RELATIVE = [name for name, each in OPERATORS.items() if each.relative]
quick = settings(max_examples=15, deadline=None, derandomize=True)
weight = st.one_of(st.floats(0.1, 2), st.floats(-2, -0.1))
positive = st.floats(0.1, 2)


def merged(name: str, shares: Sequence[Share], given: dict[str, object] | None = None) -> Tensor:
    update = operator_of(name, given or {}).merge(MODULE, shares)
    return update.double() if isinstance(update, Tensor) else update.B.double() @ update.A.double()


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))


def members(make: MakeShares, name: str, seed: int, weights: Sequence[float], ranks: Sequence[int]) -> list[Share]:
    if name == "smear":
        weights = [abs(each) for each in weights]
    return make(seed, weights, ranks=ranks, statistic=OPERATORS[name].statistic)


ranks = st.lists(st.integers(1, 3), min_size=1, max_size=4)


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "pcb"])  # it always drops the weakest element
@quick
@given(seed=st.integers(0, 10_000), rank=st.integers(1, 5))
def test_one_member_with_weight_one_is_that_member(make_shares: MakeShares, name: str, seed: int, rank: int) -> None:
    shares = members(make_shares, name, seed, [1.0], [rank])
    close(merged(name, shares, NOTHING.get(name)), shares[0].dense().double())


@quick
@given(seed=st.integers(0, 10_000), first=st.lists(weight, min_size=3, max_size=3), factor=weight, ranks=ranks)
def test_cat_is_linear_in_the_weights(
    make_shares: MakeShares, seed: int, first: list[float], factor: float, ranks: list[int]
) -> None:
    one = make_shares(seed, first, ranks=ranks)
    other = [replace(share, weight=1 - share.weight) for share in one]
    both = [replace(share, weight=share.weight + factor * (1 - share.weight)) for share in one]
    close(merged("cat", both), merged("cat", one) + factor * merged("cat", other))


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "lego"])  # its random start has an order
@quick
@given(seed=st.integers(0, 10_000), weights=st.lists(weight, min_size=1, max_size=4), ranks=ranks)
def test_order_does_not_matter(
    make_shares: MakeShares, name: str, seed: int, weights: list[float], ranks: list[int]
) -> None:
    shares = members(make_shares, name, seed, weights, ranks)
    close(merged(name, shares[::-1], PRUNING.get(name)), merged(name, shares, PRUNING.get(name)))


def rotated(share: Share, seed: int) -> Share:
    """The same dW from other factors: B M, M^-1 A with a random well-conditioned M."""
    random = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(share.rank, share.rank, generator=random, dtype=torch.float64)).Q
    M = Q * torch.linspace(0.5, 2, share.rank, dtype=torch.float64)
    return replace(share, B=(share.B.double() @ M).float(), A=torch.linalg.solve(M, share.A.double()).float())


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "linear"])
@quick
@given(seed=st.integers(0, 10_000), weights=st.lists(weight, min_size=1, max_size=3), ranks=ranks)
def test_other_factors_of_the_same_update_change_nothing(
    make_shares: MakeShares, name: str, seed: int, weights: list[float], ranks: list[int]
) -> None:
    shares = members(make_shares, name, seed, weights, ranks)
    turned = [rotated(shares[0], seed), *shares[1:]]
    close(merged(name, turned, PRUNING.get(name)), merged(name, shares, PRUNING.get(name)), 1e-3)


@pytest.mark.parametrize(("name", "given"), [("linear", {}), ("lego", {"units": "trained", "clusters": 2})])
def test_where_factors_themselves_are_merged_a_rotation_changes_the_blend(
    make_shares: MakeShares, name: str, given: dict[str, object]
) -> None:
    shares = make_shares(0, (0.5, 0.5), ranks=(4, 4), d_out=40, d_in=30)
    turned = [rotated(shares[0], 1), shares[1]]
    close(turned[0].dense().double(), shares[0].dense().double())
    before, after = merged(name, shares, given), merged(name, turned, given)
    assert float((after - before).norm() / before.norm()) > 0.3


@pytest.mark.parametrize("name", [name for name in RELATIVE if name != "smear"])
@quick
@given(seed=st.integers(0, 10_000), weights=st.lists(positive, min_size=2, max_size=3), factor=st.floats(0.25, 4))
def test_only_the_ratios_of_relative_weights_count(
    make_shares: MakeShares, name: str, seed: int, weights: list[float], factor: float
) -> None:
    shares = members(make_shares, name, seed, weights, [2])
    stronger = [replace(share, weight=factor * share.weight) for share in shares]
    close(merged(name, stronger), merged(name, shares))


@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in (*RELATIVE, "layer_swap")])
@quick
@given(seed=st.integers(0, 10_000), weights=st.lists(weight, min_size=1, max_size=3), factor=st.floats(0.25, 4))
def test_absolute_weights_scale_the_result(
    make_shares: MakeShares, name: str, seed: int, weights: list[float], factor: float
) -> None:
    shares = members(make_shares, name, seed, weights, [2])
    stronger = [replace(share, weight=factor * share.weight) for share in shares]
    close(merged(name, stronger), factor * merged(name, shares))


@pytest.mark.parametrize("name", list(OPERATORS))
def test_rank_one_ties_and_zeros_give_numbers(make_shares: MakeShares, name: str) -> None:
    """A member that changes nothing, one that is all ties, d_out below the rank, one column."""
    for d_out, d_in in [(1, 6), (7, 1), (2, 2)]:
        shares = make_shares(
            0, (1.0, 0.5, 0.25), ranks=(3,), d_out=d_out, d_in=d_in, statistic=OPERATORS[name].statistic
        )
        shares[0] = replace(shares[0], B=torch.zeros(d_out, 3))
        shares[1] = replace(shares[1], B=torch.ones(d_out, 3), A=torch.ones(3, d_in))
        update = merged(name, shares, PRUNING.get(name))
        assert update.shape == (d_out, d_in)
        assert bool(update.isfinite().all())
        nothing = [replace(share, B=torch.zeros(d_out, 3)) for share in shares]
        assert not merged(name, nothing, PRUNING.get(name)).any()
