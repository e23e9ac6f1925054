"""Every operator against its published formula, written out densely, element by element where that is clearer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from router.blending.compress import compress, randomised_svd
from router.blending.elementwise import random_mask
from router.blending.lego import k_means
from router.blending.operator import Share
from router.blending.operators import operator_of
from router.lowrank import Factors

Matrix = NDArray[np.float64]
MakeShares = Callable[..., list[Share]]
MODULE = "model.layers.0.self_attn.q_proj"
WEIGHTS = (0.5, 0.3, -0.4)


def merged(name: str, shares: Sequence[Share], module: str = MODULE, **settings: object) -> Matrix:
    return dense(operator_of(name, settings).merge(module, shares))


def dense(update: Factors | Tensor) -> Matrix:
    found = update if isinstance(update, Tensor) else update.B.double() @ update.A.double()
    return found.double().numpy()


def deltas(shares: Sequence[Share]) -> list[Matrix]:
    return [share.scale * share.B.double().numpy() @ share.A.double().numpy() for share in shares]


def close(actual: Matrix, expected: Matrix, tolerance: float = 2e-5) -> None:
    np.testing.assert_allclose(actual, expected, atol=tolerance * max(1.0, float(np.abs(expected).max())))


def elements(*matrices: Matrix) -> list[tuple[int, int]]:
    return list(np.ndindex(*matrices[0].shape))


def top(D: Matrix, count: int) -> Matrix:
    """The `count` largest elements by magnitude, zero for the others."""
    kept = np.zeros_like(D)
    for i, j in sorted(elements(D), key=lambda at: -abs(D[at]))[:count]:
        kept[i, j] = D[i, j]
    return kept


def elected(D: Sequence[Matrix], w: Sequence[float], mean: str) -> Matrix:
    """Signs elected, then the mean of those that agree: PEFT's way ("count") or mergekit's ("weights")."""
    result = np.zeros_like(D[0])
    for at in elements(D[0]):
        if mean == "count":
            sign = 1 if sum(d[at] for d in D) >= 0 else -1
            agree = [(d[at], weight) for d, weight in zip(D, w, strict=True) if np.sign(d[at]) == sign]
            divisor: float = len(agree)
        else:
            sign = 1 if sum(weight * d[at] for d, weight in zip(D, w, strict=True)) >= 0 else -1
            agree = [(d[at], weight) for d, weight in zip(D, w, strict=True) if np.sign(weight * d[at]) == sign]
            divisor = sum(abs(weight) for _, weight in agree)
        result[at] = sum(weight * d for d, weight in agree) / divisor if agree else 0.0
    return result


@pytest.fixture
def shares(make_shares: MakeShares) -> list[Share]:
    return make_shares(1, WEIGHTS, ranks=(2, 3, 1))


def test_cat_and_svd(shares: list[Share]) -> None:
    total = sum(w * D for w, D in zip(WEIGHTS, deltas(shares), strict=True))
    close(merged("cat", shares), total)
    U, S, Vt = np.linalg.svd(total)
    best = U[:, :3] * S[:3] @ Vt[:3]
    close(dense(compress(operator_of("svd", {}).merge(MODULE, shares), 3).factors), best)


def test_task_arithmetic_scales_the_sum(shares: list[Share]) -> None:
    close(merged("task_arithmetic", shares, scale=0.3), 0.3 * merged("cat", shares))


def test_smear_averages_whole_weight_matrices(make_shares: MakeShares) -> None:
    shares = make_shares(2, (0.2, 0.7, 0.1))
    W0 = np.random.default_rng(0).standard_normal((7, 6))
    average = sum(share.weight * (W0 + D) for share, D in zip(shares, deltas(shares), strict=True))
    close(W0 + merged("smear", shares), average)
    assert operator_of("smear", {}).weigh([2.0, 7.0, 1.0]) == [0.2, 0.7, 0.1]


def test_linear_sums_the_factors(shares: list[Share]) -> None:
    B, A = np.zeros((7, 3)), np.zeros((3, 6))
    for share in shares:
        strength = share.weight * share.scale
        B[:, : share.rank] += np.sqrt(abs(strength)) * share.B.double().numpy()
        A[: share.rank] += np.sign(strength) * np.sqrt(abs(strength)) * share.A.double().numpy()
    close(merged("linear", shares), B @ A)


@pytest.mark.parametrize("mean", ["weights", "count"])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties(shares: list[Share], mean: str, density: float) -> None:
    trimmed = [top(D, int(density * D.size)) for D in deltas(shares)]
    close(merged("ties", shares, density=density, mean=mean), elected(trimmed, WEIGHTS, mean))


def test_magnitude_prune(shares: list[Share]) -> None:
    expected = sum(w * top(D, int(0.3 * D.size)) for w, D in zip(WEIGHTS, deltas(shares), strict=True))
    close(merged("magnitude_prune", shares, density=0.3), expected)


def masks(shares: Sequence[Share], p: float) -> list[Matrix]:
    return [random_mask(share.dense(), p, share.seed).double().numpy() for share in shares]


def test_dare(shares: list[Share]) -> None:
    dropped = [mask * D / 0.6 for mask, D in zip(masks(shares, 0.6), deltas(shares), strict=True)]
    expected = sum(w * D for w, D in zip(WEIGHTS, dropped, strict=True))
    close(merged("dare_linear", shares, density=0.6), expected)
    for mean in ("weights", "count"):
        close(merged("dare_ties", shares, density=0.6, mean=mean), elected(dropped, WEIGHTS, mean))


def test_a_random_mask_keeps_the_share_it_should_and_depends_on_its_seed() -> None:
    X = torch.zeros(100, 100)
    mask = random_mask(X, 0.3, seed=5)
    assert 0.28 < float(mask.mean()) < 0.32
    torch.testing.assert_close(mask, random_mask(X, 0.3, seed=5))
    assert not torch.equal(mask, random_mask(X, 0.3, seed=6))


def test_della_keeps_larger_elements_likelier(shares: list[Share]) -> None:
    density, epsilon = 0.5, 0.3
    dropped = []
    for share, D in zip(shares, deltas(shares), strict=True):
        p = np.zeros_like(D)
        for i, row in enumerate(D):
            for rank, j in enumerate(np.argsort(np.abs(row))):  # 0: the smallest
                p[i, j] = density - epsilon + 2 * epsilon * rank / (len(row) - 1)
        mask = random_mask(share.dense(), torch.tensor(p, dtype=torch.float32), share.seed).double().numpy()
        dropped.append(mask * D / p)
    expected = 1.5 * elected(dropped, WEIGHTS, "weights")
    close(merged("della", shares, density=density, epsilon=epsilon, scale=1.5), expected)


def test_breadcrumbs_leaves_out_both_ends(shares: list[Share]) -> None:
    expected = np.zeros((7, 6))
    for w, D in zip(WEIGHTS, deltas(shares), strict=True):
        order = sorted(elements(D), key=lambda at: -abs(D[at]))
        for at in order[int(0.1 * 42) : int(0.1 * 42) + int(0.5 * 42)]:
            expected[at] += 2 * w * D[at]
    close(merged("breadcrumbs", shares, density=0.5, outliers=0.1, scale=2.0), expected)
    total = sum(w * D for w, D in zip(WEIGHTS, deltas(shares), strict=True))
    close(merged("breadcrumbs", shares, density=1.0, outliers=0.1), total)


@pytest.mark.parametrize("select", [0.3, 1.0])
def test_sce(make_shares: MakeShares, select: float) -> None:
    shares = make_shares(3, (1.0, 1.0, 1.0), ranks=(1, 2, 2))
    D = deltas(shares)
    variance = np.var(np.stack(D), axis=0)
    keep = top(variance, int(select * np.count_nonzero(variance))) > 0
    D = [d * keep for d in D]
    energy = [float((d**2).sum() / d.size) for d in D]
    expected = np.zeros_like(D[0])
    for at in elements(D[0]):
        sign = 1 if sum(d[at] for d in D) >= 0 else -1
        agree = [(e, d[at]) for e, d in zip(energy, D, strict=True) if np.sign(d[at]) == sign]
        expected[at] = sum(e * d for e, d in agree) / sum(e for e, _ in agree) if agree else 0.0
    close(merged("sce", shares, select=select), expected)


def test_pcb(make_shares: MakeShares) -> None:
    """As the authors' code: sorted arrays for the clamps, min-max norms, exp and tanh."""
    shares = make_shares(4, (1.0, 1.0, 1.0), ranks=(2,))
    D, n, ratio = [d.flatten() for d in deltas(shares)], 3, 0.4

    def clamped(x: Matrix, low: float, high: float) -> Matrix:
        order = np.sort(x)
        return np.clip(x, order[int(len(x) * low)], order[int(len(x) * (1 - high) - 1)])

    def norm(x: Matrix) -> Matrix:
        return (x - x.min()) / (x.max() - x.min())

    coefficients, values = [], []
    for d in D:
        magnitude = clamped(np.abs(d), 1e-4, 1e-4)
        balance = np.exp(n * norm(magnitude) ** 2) * np.tanh(d * sum(D))
        coefficients.append(norm(clamped(balance, 1 - ratio, 0)))
        values.append(np.sign(d) * magnitude)
    expected = sum(c * v for c, v in zip(coefficients, values, strict=True)) / np.maximum(sum(coefficients), 1e-12)
    close(merged("pcb", shares, density=ratio).flatten(), expected)


@pytest.mark.parametrize("least", [1, 2, 3])
def test_consensus(shares: list[Share], least: int) -> None:
    D = deltas(shares)
    expected = np.zeros_like(D[0])
    for at in elements(D[0]):
        together = sum(d[at] for d in D)
        users = sum(abs(d[at]) > 0.4 * abs(together - d[at]) for d in D)
        if users >= least:
            expected[at] = sum(w * d[at] for w, d in zip(WEIGHTS, D, strict=True))
    close(merged("consensus", shares, least=least), expected)


@pytest.mark.parametrize("ranks", [(2, 1, 2), (4, 4, 4)])  # together below and above what d_out = 7 allows
def test_knots_merges_in_the_shared_basis(make_shares: MakeShares, ranks: tuple[int, ...]) -> None:
    shares = make_shares(5, WEIGHTS, ranks=ranks)
    U, S, Vt = np.linalg.svd(np.hstack(deltas(shares)), full_matrices=False)
    r = int((1e-9 * S[0] < S).sum())
    blocks = [Vt[:r, 6 * k : 6 * (k + 1)] for k in range(3)]
    trimmed = [top(block, int(0.5 * block.size)) for block in blocks]
    expected = U[:, :r] * S[:r] @ elected(trimmed, WEIGHTS, "weights")
    close(merged("knots", shares, density=0.5), expected, 1e-4)


def test_fisher_weighs_every_element(make_shares: MakeShares) -> None:
    shares = make_shares(6, (0.5, 2.0), statistic="fisher")
    assert shares[0].statistic is not None
    shares[0].statistic[0, 0] = 0.0
    F = [share.statistic.double().numpy() for share in shares if share.statistic is not None]
    W0 = np.random.default_rng(0).standard_normal((7, 6))
    top_ = sum(s.weight * f * (W0 + D) for s, f, D in zip(shares, F, deltas(shares), strict=True))
    expected = top_ / sum(s.weight * f for s, f in zip(shares, F, strict=True)) - W0
    close(merged("fisher", shares), expected)


def test_without_any_information_fisher_is_the_mean(make_shares: MakeShares) -> None:
    shares = make_shares(6, (1.0, 3.0), statistic="fisher")
    for share in shares:
        assert share.statistic is not None
        share.statistic.zero_()
    first, second = deltas(shares)
    close(merged("fisher", shares), (first + 3 * second) / 4)


def test_regmean_is_the_least_squares_solution(make_shares: MakeShares) -> None:
    shares = make_shares(7, (0.5, 0.3, 0.2), ranks=(2, 1, 3), statistic="gram")
    G = [share.statistic.double().numpy() for share in shares if share.statistic is not None]
    G = [0.8 * g + 0.2 * np.diag(np.diag(g)) for g in G]
    W0 = np.random.default_rng(0).standard_normal((7, 6))
    left = sum(s.weight * (W0 + D) @ g for s, D, g in zip(shares, deltas(shares), G, strict=True))
    expected = left @ np.linalg.inv(sum(s.weight * g for s, g in zip(shares, G, strict=True))) - W0
    close(merged("regmean", shares, shrink=0.8), expected, 1e-4)


def test_regmean_survives_inputs_that_never_use_some_directions(make_shares: MakeShares) -> None:
    shares = make_shares(7, (1.0, 1.0), statistic="gram")
    for share in shares:
        assert share.statistic is not None
        share.statistic[0] = 0
        share.statistic[:, 0] = 0
    assert np.isfinite(merged("regmean", shares)).all()


def test_layer_swap_takes_the_owner_s_layers_and_mixes_the_others(shares: list[Share]) -> None:
    layers = {"a": "0-1", "c": "3"}
    D = deltas(shares)
    for layer, expected in [(0, D[0]), (1, D[0]), (2, sum(w * d for w, d in zip(WEIGHTS, D, strict=True))), (3, D[2])]:
        close(merged("layer_swap", shares, module=f"model.layers.{layer}.mlp.up_proj", layers=layers), expected)
    absent = merged("layer_swap", shares[1:], module="model.layers.0.mlp.up_proj", layers=layers)
    assert not absent.any()  # the layer's owner changes nothing there


def test_lego_with_a_cluster_for_every_unit_is_the_rescaled_sum(make_shares: MakeShares) -> None:
    shares = make_shares(8, (1.0, 1.0, 1.0), ranks=(1, 2, 3))
    for units in ("singular", "trained"):
        output = np.sqrt(2 / 6)  # mean rank 2, 6 clusters
        close(merged("lego", shares, clusters=6, units=units), output * sum(deltas(shares)))


def test_lego_gives_each_cluster_its_mean_with_the_members_mean_length(make_shares: MakeShares) -> None:
    """Two members that are nearly the same up to length: units pair up across members."""
    first = make_shares(9, (1.0,), ranks=(2,), d_out=30, d_in=20)[0]
    second = Share(id="b", weight=3.0, B=first.B * 1.1, A=first.A * 1.1, scale=first.scale)
    units = [np.hstack([s.B.mT.double().numpy(), s.A.double().numpy()]) * np.sqrt(s.scale) for s in (first, second)]
    expected = np.zeros((30, 20))
    for one, other in zip(*units, strict=True):
        mean = (one + 3 * other) / 4
        length = (np.linalg.norm(one) + 3 * np.linalg.norm(other)) / 4
        unit = mean / np.linalg.norm(mean) * length
        expected += np.outer(unit[:30], unit[30:])
    close(merged("lego", [first, second], units="trained"), expected)


def test_k_means_finds_separate_clusters_and_leaves_none_empty() -> None:
    random = torch.Generator().manual_seed(0)
    centres = 10 * torch.eye(4)
    points = torch.cat([centres + 0.1 * torch.randn(4, 4, generator=random) for _ in range(5)])
    labels = k_means(points, 4, seed=3)
    assert len(set(labels[:4].tolist())) == 4
    torch.testing.assert_close(labels, labels[:4].repeat(5))
    assert sorted(set(k_means(torch.zeros(5, 2), 3, seed=0).tolist())) == [0, 1, 2]


def test_the_randomised_svd_keeps_nearly_the_best_energy() -> None:
    random = torch.Generator().manual_seed(0)
    M = torch.randn(540, 12, generator=random) @ torch.randn(12, 620, generator=random)
    M += 2 * torch.randn(540, 620, generator=random)  # a signal of rank 12 in noise, as TIES leaves it
    best = torch.linalg.svdvals(M.double())[:8].square().sum()
    kept = randomised_svd(M, 8).S[:8].double().square().sum()
    assert 0.999 * best < kept <= 1.000001 * best
    done = compress(M, 8)  # over the size of an exact SVD
    rest = M - done.factors.B @ done.factors.A
    assert float(rest.double().square().sum()) == pytest.approx(done.lost, rel=1e-4)
    assert done.total == pytest.approx(float(M.double().square().sum()))
