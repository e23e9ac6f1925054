"""Composites in the segment path: the gate on rank rows against explicit products, state against one pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from router.gating import GATES, gate_of
from router.gating.gate import Step, Table
from router.gating.layout import Layout, Member
from serving.engine.batch import COLLECT, TRACE, WEIGHTS, Request
from serving.engine.gating import spread_of, spread_of_shares
from serving.engine.slots import table_of

K, ROWS, BLOCK = 3, 4, 4
NO_BLOCKS = np.zeros(1, dtype=np.int32)


def layout_of(gate: str, rows: tuple[int, ...] = (ROWS,) * K, **settings: Any) -> Layout:
    members = tuple(Member(id=f"expert{k}", rows=r) for k, r in enumerate(rows))
    layout = Layout(gate=gate, settings=settings, members=members, extra=K if GATES[gate].extra else 0)
    return layout.model_copy(update={"form": gate_of(layout).form})


def tables(bench, layout: Layout, absent: bool = False) -> dict[str, dict[str, torch.Tensor]]:
    """Random constants for every module; with `absent`, the second expert lacks every second module."""
    g = torch.Generator().manual_seed(5)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for i, module in enumerate(module for group in bench.groups for module in group.modules):
        mean, deviation = torch.rand(K, generator=g), 0.5 + torch.rand(K, generator=g)
        scale, centre = 0.5 + torch.rand(layout.rank, generator=g), torch.randn(layout.rank, generator=g)
        found[module] = {"mean": mean, "deviation": deviation, "scale": scale, "centre": centre}
        if absent:
            found[module]["present"] = torch.tensor([True, i % 2 == 0, True])
    return found


def fill(bench, slot: int, layout: Layout, absent: bool = False) -> dict[str, dict[str, torch.Tensor]]:
    constants = tables(bench, layout, absent)
    bench.fill(slot, bench.random(slot, layout.rank), layout, constants)
    return constants


def request(tokens: int, computed: int = 0, slot: int = 0, name: str = "a", blocks: Any = NO_BLOCKS, **arguments: Any):
    return Request(name, slot, tokens, computed, np.asarray(blocks), arguments)


def explicit(bench, slot: int, group, layout: Layout, constants, x, evidence=None, given=None) -> torch.Tensor:
    """y = sum_k g_k B_k A_k x, one expert and module at a time."""
    modules = group.modules
    z = torch.stack([x @ bench.factors[slot][module][0].T for module in modules], 1)  # (t, n, R)
    table: Table = table_of(group.index, modules, layout, constants)
    length, spread = x.norm(dim=-1)[:, None, None], x.std(-1, correction=0)[:, None, None]
    gated = z.clone()
    weights = gate_of(layout)(gated, table, Step(length, spread, given, evidence, group.d_in))  # (t, n, K)
    if layout.gate == "hilora":  # it weighs single directions
        return torch.cat([gated[:, i] @ bench.factors[slot][m][1].T for i, m in enumerate(modules)], 1)
    y = torch.zeros(len(x), sum(group.widths))
    for i, module in enumerate(modules):
        A, B = bench.factors[slot][module]
        for k, (start, rows) in enumerate(zip(layout.starts, layout.blocks, strict=True)):
            dW = B[:, start : start + rows] @ A[start : start + rows]
            columns = slice(sum(group.widths[:i]), sum(group.widths[: i + 1]))
            y[:, columns] += weights[:, i, k : k + 1] * (x @ dW.T)
    return y


STATELESS = [name for name, gate in GATES.items() if not gate.stateful]


@pytest.mark.parametrize("gate", STATELESS)
@pytest.mark.parametrize("absent", [False, True])
def test_a_gate_weighs_the_experts_outputs(bench, gate, absent):
    layout = layout_of(gate)
    constants = fill(bench, 0, layout, absent)
    fill(bench, 1, layout_of("arrow", (2, 5, 1), top_k=2))
    bench.step([request(5), request(1, slot=1, name="b"), request(2, slot=-1, name="c"), request(3, name="d")])
    rows = [0, 1, 2, 3, 4, 8, 9, 10]
    for group in bench.groups:
        x = torch.randn(11, group.d_in)
        expected = explicit(bench, 0, group, layout, constants, x[rows])
        torch.testing.assert_close(bench.linear(group, x)[rows], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(bench.sharded(group, x)[rows], expected, atol=1e-5, rtol=1e-5)
        assert not bench.linear(group, x)[6:8].any()


@pytest.mark.parametrize("settings", [{"normalise": "rms"}, {"normalise": "unit"}, {"normalise": "zscore", "top_k": 1}])
def test_scores_are_normalised_by_the_token_s_own_input(bench, settings):
    layout = layout_of("spectr", (2, 5, 1), **settings)
    constants = fill(bench, 0, layout)
    bench.step([request(6)])
    for group in bench.groups:
        x = torch.randn(6, group.d_in) * 10
        expected = explicit(bench, 0, group, layout, constants, x)
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
    layout = layout_of("arrow")
    modules = [group.modules[-1] for group in bench.groups]
    bench.fill(0, bench.random(0, dict.fromkeys(modules, layout.rank)), layout)
    bench.step([request(3)])
    group = bench.groups[0]
    x = torch.randn(3, group.d_in)
    y = bench.linear(group, x)
    assert not y[:, : sum(group.widths[:-1])].any()
    assert y[:, sum(group.widths[:-1]) :].any()


def test_a_request_s_own_weights_replace_the_defaults_for_its_rows_only(bench):
    layout = layout_of("constant")
    constants = fill(bench, 0, layout)
    own = [0.7, -0.2, 0.0]
    bench.step([request(2), request(3, name="b", **{WEIGHTS: own}), request(1, name="c")])
    group = bench.groups[0]
    x = torch.randn(6, group.d_in)
    given = torch.full((6, K), torch.nan)
    given[2:5] = torch.tensor(own)
    expected = explicit(bench, 0, group, layout, constants, x, given=given)
    torch.testing.assert_close(bench.linear(group, x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "weights",
    [[1.0], [1.0, 2.0, "x"], "abc", 5, {"a": 1}, [float("nan")] * 3, [float("inf")] * 3, [[1]] * 3, [1e30] * 3],
)
@pytest.mark.parametrize("gate", ["constant", "evidence"])
def test_unusable_weights_are_ignored(bench, caplog, gate, weights):
    fill(bench, 0, layout_of(gate))
    group = bench.groups[0]
    x = torch.randn(2, group.d_in)
    bench.step([request(2)], block_size=BLOCK, num_blocks=2)
    expected = bench.linear(group, x)
    bench.step([request(2, **{WEIGHTS: weights})], block_size=BLOCK, num_blocks=2)
    assert torch.equal(bench.linear(group, x), expected)
    assert "not 3 usable weights" in caplog.text


@pytest.mark.parametrize("prior", [[0.0, 0.0, 0.0], [-1.0, 1.0, 1.0]])
def test_a_prior_must_be_one(bench, caplog, prior):
    fill(bench, 0, layout_of("evidence"))
    bench.step([request(2, **{WEIGHTS: prior})], block_size=BLOCK, num_blocks=2)
    assert torch.isfinite(bench.linear(bench.groups[0], torch.randn(2, bench.groups[0].d_in))).all()
    assert "usable weights" in caplog.text


def test_scores_are_not_rounded_to_the_model_s_half_precision(bench):
    """Of two experts that are all but alike the better one is picked for every token."""
    layout = layout_of("arrow", (8, 8), top_k=1)
    bench.cast(torch.bfloat16)
    group = bench.groups[1]
    A, B = bench.random(0, 16)[group.modules[0]]
    A[:8] = A[:8].sign()
    A[8:] = A[:8] * (1 + 2**-7)  # the next number that bfloat16 has: scores in bfloat16 would often tie
    bench.fill(0, {group.modules[0]: (A, B)}, layout)
    bench.step([request(64, **{TRACE: "key"})])
    bench.linear(group, torch.randn(64, group.d_in).bfloat16(), torch.zeros(64, sum(group.widths)).bfloat16())
    assert bench.wrapper.gates.trace("key").weights[group.index].tolist() == [0.0, 1.0]


def test_rows_that_pad_a_batch_belong_to_nobody(bench):
    constants = fill(bench, 0, layout_of("constant"))
    bench.step([request(3, **{WEIGHTS: [1, 2, 3]})])
    group = bench.groups[0]
    x = torch.randn(5, group.d_in)
    given = torch.tensor([1.0, 2.0, 3.0]).expand(3, -1)
    expected = explicit(bench, 0, group, layout_of("constant"), constants, x[:3], given=given)
    for y in (bench.linear(group, x), bench.sharded(group, x)):
        torch.testing.assert_close(y[:3], expected, atol=1e-5, rtol=1e-5)
        assert not y[3:].any()


def test_in_the_engine_s_dry_runs_a_composite_adds_nothing(bench):
    fill(bench, 0, layout_of("arrow"))
    bench.map(torch.zeros(3, dtype=torch.long))
    bench.wrapper.gates.close()
    group = bench.groups[0]
    assert not bench.linear(group, torch.randn(3, group.d_in)).any()


class OnePass:
    """The slow twin of evidence: one request, uninterrupted, token by token."""

    def __init__(self) -> None:
        self.total = 0.0

    def add(self, index, score):
        sums = [sum(score[: t + 1].double()) for t in range(len(score))]
        self.total = self.total + torch.stack(sums)
        return self.total.float()


class Server:
    """A scheduler in small: requests with their inputs, physical blocks, and what came out for each token."""

    def __init__(self, bench, seed: int) -> None:
        self.bench = bench
        self.g = torch.Generator().manual_seed(seed)
        self.inputs: dict[str, list[torch.Tensor]] = {}  # by group, (tokens, d_in)
        self.blocks: dict[str, list[int]] = {}
        self.done: dict[str, int] = {}
        self.out: dict[str, list[torch.Tensor]] = {}
        self.cached: dict[str, int] = {}  # tokens that were never computed here
        self.free = torch.randperm(64, generator=self.g).tolist()

    def arrive(self, name: str, tokens: int, prefix_of: str | None = None, shared: int = 0) -> None:
        """With `prefix_of`, the first `shared` blocks are that request's own, inputs and physical blocks."""
        fresh = [torch.randn(tokens, group.d_in, generator=self.g) for group in self.bench.groups]
        self.blocks[name] = [self.free.pop() for _ in range(-(-tokens // BLOCK))]
        self.done[name] = shared * BLOCK
        if prefix_of is not None:
            for mine, theirs in zip(fresh, self.inputs[prefix_of], strict=True):
                mine[: shared * BLOCK] = theirs[: shared * BLOCK]
            self.blocks[name][:shared] = self.blocks[prefix_of][:shared]
        self.inputs[name] = fresh
        self.out[name] = [torch.zeros(tokens, sum(group.widths)) for group in self.bench.groups]

    def step(self, chunks: dict[str, int], **arguments: dict[str, Any]) -> None:
        """So many tokens of each request, in this order."""
        requests = [
            request(n, self.done[name], name=name, blocks=self.blocks[name], **arguments.get(name, {}))
            for name, n in chunks.items()
        ]
        self.bench.step(requests, block_size=BLOCK, num_blocks=64)
        for i, group in enumerate(self.bench.groups):
            x = torch.cat([self.inputs[name][i][self.done[name] : self.done[name] + n] for name, n in chunks.items()])
            y = self.bench.linear(group, x).split(list(chunks.values()))
            for (name, n), part in zip(chunks.items(), y, strict=True):
                self.out[name][i][self.done[name] : self.done[name] + n] = part
        for name, n in chunks.items():
            self.done[name] += n

    def check(self, layout, constants, names=None, given=None) -> None:
        for name in names or self.inputs:
            evidence = OnePass()
            for i, group in enumerate(self.bench.groups):
                x = self.inputs[name][i]
                row = None if given is None else torch.tensor(given).expand(len(x), -1)
                expected = explicit(self.bench, 0, group, layout, constants, x, evidence, row)
                start = self.cached.get(name, 0)
                found = self.out[name][i]
                torch.testing.assert_close(found[start:], expected[start:], atol=1e-5, rtol=1e-5)


@pytest.fixture
def evidence(bench):
    layout = layout_of("evidence", normalise="zscore")
    return layout, fill(bench, 0, layout, absent=True)


@pytest.mark.parametrize("seed", range(8))
def test_evidence_is_the_same_however_a_request_is_cut_into_steps(bench, evidence, seed):
    """Long prompts in chunks beside others that decode, in any order."""
    server, g = Server(bench, seed), np.random.default_rng(seed)
    lengths = {name: int(g.integers(1, 4 * BLOCK)) for name in "abcd"}
    for name, tokens in lengths.items():
        server.arrive(name, tokens)
    while left := [name for name in lengths if server.done[name] < lengths[name]]:
        g.shuffle(left)
        some = left[: int(g.integers(1, len(left) + 1))]
        server.step({name: int(g.integers(1, min(lengths[name] - server.done[name], 6) + 1)) for name in some})
    server.check(*evidence)


def test_evidence_comes_with_cached_blocks_of_another_request(bench, evidence):
    server = Server(bench, 1)
    server.arrive("a", 3 * BLOCK)
    server.step({"a": 3 * BLOCK})
    server.arrive("b", 3 * BLOCK, prefix_of="a", shared=2)
    server.step({"b": 2})
    server.step({"b": 2})
    server.cached = {"b": 2 * BLOCK}
    server.check(*evidence)


def test_evidence_comes_with_blocks_that_another_request_fills_in_the_same_step(bench, evidence):
    """vLLM counts blocks as cached as soon as they are scheduled; and c continues where b ends, b where a does."""
    server = Server(bench, 2)
    server.arrive("a", 2 * BLOCK)
    server.arrive("b", 3 * BLOCK, prefix_of="a", shared=2)
    server.arrive("c", 3 * BLOCK + 1, prefix_of="b", shared=3)
    server.step({"c": 1, "a": 2 * BLOCK, "b": BLOCK})
    server.cached = {"b": 2 * BLOCK, "c": 3 * BLOCK}
    server.check(*evidence)


def test_a_single_token_may_start_from_a_block_that_another_single_token_fills(bench, evidence):
    server = Server(bench, 3)
    server.arrive("a", BLOCK)
    server.step({"a": BLOCK - 1})
    server.arrive("b", BLOCK + 1, prefix_of="a", shared=1)
    server.step({"a": 1, "b": 1})
    server.cached = {"b": BLOCK}
    server.check(*evidence)


def test_evidence_starts_anew_after_preemption_in_blocks_with_a_past(bench, evidence):
    server = Server(bench, 4)
    server.arrive("a", 10)
    server.step({"a": 7})
    server.done["a"], server.blocks["a"] = 0, server.blocks["a"][::-1]
    server.step({"a": 4})
    server.step({"a": 6})
    server.check(*evidence)


def test_evidence_is_weighed_against_the_request_s_prior(bench, evidence):
    server, prior = Server(bench, 5), [0.9, 0.1, 0.0]
    server.arrive("a", 6)
    server.step({"a": 4}, a={WEIGHTS: prior})
    server.step({"a": 2}, a={WEIGHTS: prior})
    server.check(*evidence, given=prior)


def test_a_request_gone_wrong_does_not_reach_its_neighbours(bench, evidence):
    server = Server(bench, 6)
    for name in "ab":
        server.arrive(name, 5)
    server.inputs["a"][0][1] = torch.nan
    server.step({"a": 5, "b": 5})
    server.check(*evidence, names=["b"])


def test_composites_of_different_size_share_the_table_of_evidence(bench, evidence):
    server = Server(bench, 7)
    server.arrive("a", 6)
    server.step({"a": 3})
    wide = Layout(gate="probe", members=tuple(Member(id=f"e{k}", rows=2) for k in range(5)))
    bench.fill(1, bench.random(1, wide.rank), wide, {})
    bench.wrapper.gates.evidence.step([request(1, slot=1, name="other", blocks=[63])], bench_batch(), 5)
    server.step({"a": 3})
    server.check(*evidence)


def bench_batch():
    from serving.engine.batch import Batch

    return Batch((), BLOCK, 64)


def test_a_probe_answers_as_the_base_model_and_leaves_its_evidence(bench):
    layout = layout_of("probe", normalise="none")
    constants = fill(bench, 0, layout)
    server = Server(bench, 8)
    server.arrive("a", 7)
    asked = {"a": {TRACE: "key", COLLECT: "evidence"}}
    server.step({"a": 4}, **asked)
    server.step({"a": 3}, **asked)
    assert not any(y.any() for y in server.out["a"])
    trace = bench.wrapper.gates.trace("key")
    total = OnePass()
    for i, group in enumerate(bench.groups):
        explicit(bench, 0, group, layout, constants, server.inputs["a"][i], total)
    torch.testing.assert_close(torch.tensor(trace.evidence), total.total[-1].float(), atol=1e-4, rtol=1e-5)
    assert trace.tokens == 7
    assert bench.wrapper.gates.trace("key") is None, "a trace is handed out once"


def test_a_trace_has_the_mean_weights_of_its_own_request(bench):
    layout = layout_of("arrow", top_k=2)
    constants = fill(bench, 0, layout)
    server = Server(bench, 9)
    for name in "ab":
        server.arrive(name, 6)
    server.step({"b": 6, "a": 2}, a={TRACE: "key", COLLECT: "moments"})
    server.step({"a": 4}, a={TRACE: "key", COLLECT: "moments"})
    trace = bench.wrapper.gates.trace("key")
    totals = torch.zeros(6, K)
    for i, group in enumerate(bench.groups):
        x = server.inputs["a"][i]
        z = torch.stack([x @ bench.factors[0][module][0].T for module in group.modules], 1)
        gate, table = gate_of(layout), table_of(i, group.modules, layout, constants)
        scores, weights = gate.raw(z, table, Step()), gate.weights(z, table, Step())
        torch.testing.assert_close(torch.tensor(trace.weights[i]), weights.mean((0, 1)), atol=1e-5, rtol=1e-5)
        totals += weights.mean(1)
        for j, module in enumerate(group.modules):
            for name, expected in {
                "count": torch.full((K,), 6.0),
                "score": scores[:, j].sum(0),
                "square": scores[:, j].square().sum(0),
                "z": z[:, j].sum(0),
            }.items():
                found = torch.tensor(trace.moments[f"{module}.{name}"]).float()
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert trace.top.tolist() == totals.argmax(-1).tolist()
    assert trace.tokens == 6


def test_a_token_that_is_computed_again_is_traced_once(bench):
    fill(bench, 0, layout_of("arrow"))
    server = Server(bench, 10)
    server.arrive("a", 6)
    server.step({"a": 5}, a={TRACE: "key"})
    server.done["a"] = 0
    server.step({"a": 6}, a={TRACE: "key"})
    assert bench.wrapper.gates.trace("key").tokens == 6


def test_traces_that_nobody_fetches_make_room(bench):
    from serving.engine.trace import CAPACITY

    fill(bench, 0, layout_of("arrow"))
    for i in range(CAPACITY + 1):
        bench.step([request(1, name=f"r{i}", **{TRACE: f"key{i}"})])
    assert bench.wrapper.gates.trace("key0") is None
    assert bench.wrapper.gates.trace(f"key{CAPACITY}") is not None


@pytest.mark.parametrize("key", [5, None, ["a"], {"a": 1}])
def test_a_key_that_is_no_text_traces_nothing(bench, key):
    fill(bench, 0, layout_of("arrow"))
    bench.step([request(1, **{TRACE: key})])
    assert bench.wrapper.gates.trace("5") is None


def test_a_trace_survives_its_journey():
    from serving.engine import Trace
    from serving.engine.transport import pack, unpack

    trace = Trace(("a", "b"), 3, np.ones((2, 4)), np.arange(3), np.zeros(4), {"m.count": np.ones(4)})
    back = unpack(*pack(trace))
    assert (back.groups, back.tokens) == (("a", "b"), 3)
    for one, other in zip(
        (back.weights, back.top, back.evidence), (trace.weights, trace.top, trace.evidence), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert list(back.moments) == ["m.count"]
