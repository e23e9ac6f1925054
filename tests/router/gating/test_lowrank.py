"""The QR-reduced SVD against that of the dense product."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from router.lowrank import Factors, inner_products, stack, svd, triangle


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CASES = {
    "tall": Factors(normal(40, 5), normal(5, 30, seed=1)),
    "rank one": Factors(normal(40, 1), normal(1, 30, seed=1)),
    "rank over d_out": Factors(normal(4, 6), normal(6, 30, seed=1)),
    "rank over d_in": Factors(normal(40, 6), normal(6, 3, seed=1)),
    "rank over both": Factors(normal(3, 6), normal(6, 2, seed=1)),
    "repeated rows": Factors(normal(40, 4), normal(2, 30, seed=1).repeat(2, 1)),
    "one factor zero": Factors(torch.zeros(40, 4).double(), normal(4, 30, seed=1)),
    "unbalanced": Factors(normal(40, 4) * torch.logspace(-6, 3, 4), normal(4, 30, seed=1) * 1e-3),
    "nearly dependent": Factors(normal(40, 4), normal(1, 30, seed=1) + 1e-5 * normal(4, 30, seed=2)),
    "equal singular values": Factors(torch.linalg.qr(normal(40, 4)).Q, torch.linalg.qr(normal(30, 4)).Q.T),
}


@pytest.mark.parametrize("factors", CASES.values(), ids=CASES)
def test_the_decomposition_is_that_of_the_product(factors: Factors) -> None:
    dense = factors.B @ factors.A
    found = svd(factors)
    expected = torch.linalg.svdvals(dense)
    most = min(factors.A.shape[0], *dense.shape)
    scale = float(expected[0]) or 1.0
    assert found.S.shape == (most,)
    torch.testing.assert_close(found.S.double() / scale, expected[:most] / scale, atol=2e-7, rtol=1e-6)
    product = found.U.double() * found.S.double() @ found.Vt.double()
    torch.testing.assert_close(product / scale, dense / scale, atol=1e-6, rtol=0)
    kept = found.S > 0
    identity = torch.eye(int(kept.sum()))
    torch.testing.assert_close(found.Vt[kept] @ found.Vt[kept].T, identity, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.U[:, kept].T @ found.U[:, kept], identity, atol=1e-5, rtol=0)
    assert not found.Vt[~kept].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_may_come_in_any_precision(dtype: torch.dtype) -> None:
    factors = Factors(normal(20, 3).to(dtype), normal(3, 12, seed=1).to(dtype))
    found = svd(factors)
    dense = factors.B.double() @ factors.A.double()
    torch.testing.assert_close((found.U * found.S @ found.Vt).double(), dense, atol=1e-5, rtol=1e-5)


def test_signs_are_always_the_same() -> None:
    factors = CASES["tall"]
    flipped = Factors(-factors.B, -factors.A)
    torch.testing.assert_close(svd(factors).Vt, svd(flipped).Vt)
    largest = svd(factors).Vt.gather(1, svd(factors).Vt.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def test_a_triangle_keeps_lengths() -> None:
    for X in (normal(30, 4), normal(3, 5), normal(30, 1) + 1e-9 * normal(30, 3, seed=1)):
        R = triangle(X)
        torch.testing.assert_close(R.T @ R, X.T @ X)


def test_inner_products_of_what_is_there() -> None:
    one, two = Factors(normal(6, 2), normal(2, 5, seed=1)), Factors(normal(6, 3, seed=2), normal(3, 5, seed=3))
    found = inner_products([one, None, two])
    for i, first in enumerate((one, None, two)):
        for j, second in enumerate((one, None, two)):
            expected = ((first.B @ first.A) * (second.B @ second.A)).sum() if first and second else torch.tensor(0.0)
            assert float(found[i, j]) == pytest.approx(float(expected))
    assert not inner_products([None, None]).any()


def test_stacked_factors_are_the_sum() -> None:
    one, two = CASES["tall"], Factors(normal(40, 2, seed=5), normal(2, 30, seed=6))
    total = stack([one, two])
    torch.testing.assert_close(total.B @ total.A, one.B @ one.A + two.B @ two.A)
