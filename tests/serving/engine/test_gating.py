"""Composites in the segment path: the gate on rank rows against explicit products, state against one pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from router.gating import GATES
from serving.engine.batch import TRACE, WEIGHTS
from serving.engine.gating import spread_of, spread_of_shares

K, ROWS, BLOCK = 3, 4, 4
NO_BLOCKS = np.zeros(1, dtype=np.int32)


STATELESS = [name for name, gate in GATES.items() if not gate.stateful]


@pytest.mark.parametrize("gate", STATELESS)
@pytest.mark.parametrize("absent", [False, True])
def test_a_gate_weighs_the_experts_outputs(bench, gate, absent):
    layout = bench.layout_of(gate)
    constants = bench.compose(0, layout, absent)
    bench.compose(1, bench.layout_of("arrow", (2, 5, 1), top_k=2))
    bench.step(
        [
            bench.request(5),
            bench.request(1, slot=1, name="b"),
            bench.request(2, slot=-1, name="c"),
            bench.request(3, name="d"),
        ]
    )
    rows = [0, 1, 2, 3, 4, 8, 9, 10]
    for group in bench.groups:
        x = torch.randn(11, group.d_in)
        expected = bench.explicit(group, layout, constants, x[rows])
        torch.testing.assert_close(bench.linear(group, x)[rows], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(bench.sharded(group, x)[rows], expected, atol=1e-5, rtol=1e-5)
        assert not bench.linear(group, x)[6:8].any()


@pytest.mark.parametrize("settings", [{"normalise": "rms"}, {"normalise": "unit"}, {"normalise": "zscore", "top_k": 1}])
def test_scores_are_normalised_by_the_token_s_own_input(bench, settings):
    layout = bench.layout_of("spectr", (2, 5, 1), **settings)
    constants = bench.compose(0, layout)
    bench.step([bench.request(6)])
    for group in bench.groups:
        x = torch.randn(6, group.d_in) * 10
        expected = bench.explicit(group, layout, constants, x)
        torch.testing.assert_close(bench.linear(group, x), expected, atol=1e-4, rtol=1e-5)


def test_ranks_that_share_an_input_agree_on_its_length_and_spread():
    x = torch.randn(5, 12) + 3
    shares, sums = list(x.chunk(3, 1)), []

    def all_reduce(mine):  # what this rank adds is computed for the others as well
        sums.append(mine)
        return sum(step(share) for share in shares)

    def step(share):
        if len(sums) == 1:
            return torch.stack([share.sum(-1), share.square().sum(-1)])
        return (share - x.mean(-1, keepdim=True)).square().sum(-1)

    torch.testing.assert_close(spread_of_shares(shares[0], 12, all_reduce), spread_of(x))


def test_modules_that_no_expert_adapts_are_left_out_of_their_group(bench):
    layout = bench.layout_of("arrow")
    modules = [group.modules[-1] for group in bench.groups]
    bench.fill(0, bench.random(0, dict.fromkeys(modules, layout.rank)), layout)
    bench.step([bench.request(3)])
    group = bench.groups[0]
    x = torch.randn(3, group.d_in)
    y = bench.linear(group, x)
    assert not y[:, : sum(group.widths[:-1])].any()
    assert y[:, sum(group.widths[:-1]) :].any()


def test_a_request_s_own_weights_replace_the_defaults_for_its_rows_only(bench):
    layout = bench.layout_of("constant")
    constants = bench.compose(0, layout)
    own = [0.7, -0.2, 0.0]
    bench.step([bench.request(2), bench.request(3, name="b", **{WEIGHTS: own}), bench.request(1, name="c")])
    group = bench.groups[0]
    x = torch.randn(6, group.d_in)
    given = torch.full((6, K), torch.nan)
    given[2:5] = torch.tensor(own)
    expected = bench.explicit(group, layout, constants, x, given=given)
    torch.testing.assert_close(bench.linear(group, x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "weights",
    [[1.0], [1.0, 2.0, "x"], "abc", 5, {"a": 1}, [float("nan")] * 3, [float("inf")] * 3, [[1]] * 3, [1e30] * 3],
)
@pytest.mark.parametrize("gate", ["constant", "evidence"])
def test_unusable_weights_are_ignored(bench, caplog, gate, weights):
    bench.compose(0, bench.layout_of(gate))
    group = bench.groups[0]
    x = torch.randn(2, group.d_in)
    bench.step([bench.request(2)], block_size=BLOCK, num_blocks=2)
    expected = bench.linear(group, x)
    bench.step([bench.request(2, **{WEIGHTS: weights})], block_size=BLOCK, num_blocks=2)
    assert torch.equal(bench.linear(group, x), expected)
    assert "not 3 usable weights" in caplog.text


@pytest.mark.parametrize("prior", [[0.0, 0.0, 0.0], [-1.0, 1.0, 1.0]])
def test_a_prior_must_be_one(bench, caplog, prior):
    bench.compose(0, bench.layout_of("evidence"))
    bench.step([bench.request(2, **{WEIGHTS: prior})], block_size=BLOCK, num_blocks=2)
    assert torch.isfinite(bench.linear(bench.groups[0], torch.randn(2, bench.groups[0].d_in))).all()
    assert "usable weights" in caplog.text


def test_scores_are_not_rounded_to_the_model_s_half_precision(bench):
    """Of two experts that are all but alike the better one is picked for every token."""
    layout = bench.layout_of("arrow", (8, 8), top_k=1)
    bench.cast(torch.bfloat16)
    group = bench.groups[1]
    A, B = bench.random(0, 16)[group.modules[0]]
    A[:8] = A[:8].sign()
    A[8:] = A[:8] * (1 + 2**-7)  # the next number that bfloat16 has: scores in bfloat16 would often tie
    bench.fill(0, {group.modules[0]: (A, B)}, layout)
    bench.step([bench.request(64, **{TRACE: "key"})])
    bench.linear(group, torch.randn(64, group.d_in).bfloat16(), torch.zeros(64, sum(group.widths)).bfloat16())
    assert bench.wrapper.gates.trace("key").weights[group.index].tolist() == [0.0, 1.0]


def test_rows_that_pad_a_batch_belong_to_nobody(bench):
    constants = bench.compose(0, bench.layout_of("constant"))
    bench.step([bench.request(3, **{WEIGHTS: [1, 2, 3]})])
    group = bench.groups[0]
    x = torch.randn(5, group.d_in)
    given = torch.tensor([1.0, 2.0, 3.0]).expand(3, -1)
    expected = bench.explicit(group, bench.layout_of("constant"), constants, x[:3], given=given)
    for y in (bench.linear(group, x), bench.sharded(group, x)):
        torch.testing.assert_close(y[:3], expected, atol=1e-5, rtol=1e-5)
        assert not y[3:].any()


def test_in_the_engine_s_dry_runs_a_composite_adds_nothing(bench):
    bench.compose(0, bench.layout_of("arrow"))
    bench.map(torch.zeros(3, dtype=torch.long))
    bench.wrapper.gates.close()
    group = bench.groups[0]
    assert not bench.linear(group, torch.randn(3, group.d_in)).any()
