"""Evidence and traces over many steps, against one uninterrupted pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from router.gating import gate_of
from router.gating.gate import Step
from router.gating.layout import Layout, Member
from serving.engine.batch import COLLECT, TRACE, WEIGHTS, Batch
from serving.engine.slots import table_of

K, BLOCK = 3, 4


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
            self.bench.request(n, self.done[name], name=name, blocks=self.blocks[name], **arguments.get(name, {}))
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
                expected = self.bench.explicit(group, layout, constants, x, evidence, row)
                start = self.cached.get(name, 0)
                found = self.out[name][i]
                torch.testing.assert_close(found[start:], expected[start:], atol=1e-5, rtol=1e-5)


@pytest.fixture
def evidence(bench):
    layout = bench.layout_of("evidence", normalise="zscore")
    return layout, bench.compose(0, layout, absent=True)


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
    other = bench.request(1, slot=1, name="other", blocks=[63])
    bench.wrapper.gates.evidence.step([other], Batch((), BLOCK, 64), 5)
    server.step({"a": 3})
    server.check(*evidence)


def test_a_probe_answers_as_the_base_model_and_leaves_its_evidence(bench):
    layout = bench.layout_of("probe", normalise="none")
    constants = bench.compose(0, layout)
    server = Server(bench, 8)
    server.arrive("a", 7)
    asked = {"a": {TRACE: "key", COLLECT: "evidence"}}
    server.step({"a": 4}, **asked)
    server.step({"a": 3}, **asked)
    assert not any(y.any() for y in server.out["a"])
    trace = bench.wrapper.gates.trace("key")
    total = OnePass()
    for i, group in enumerate(bench.groups):
        bench.explicit(group, layout, constants, server.inputs["a"][i], total)
    torch.testing.assert_close(torch.tensor(trace.evidence), total.total[-1].float(), atol=1e-4, rtol=1e-5)
    assert trace.tokens == 7
    assert bench.wrapper.gates.trace("key") is None, "a trace is handed out once"


def test_a_trace_has_the_mean_weights_of_its_own_request(bench):
    layout = bench.layout_of("arrow", top_k=2)
    constants = bench.compose(0, layout)
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
    bench.compose(0, bench.layout_of("arrow"))
    server = Server(bench, 10)
    server.arrive("a", 6)
    server.step({"a": 5}, a={TRACE: "key"})
    server.done["a"] = 0
    server.step({"a": 6}, a={TRACE: "key"})
    assert bench.wrapper.gates.trace("key").tokens == 6


def test_traces_that_nobody_fetches_make_room(bench):
    from serving.engine.trace import CAPACITY

    bench.compose(0, bench.layout_of("arrow"))
    for i in range(CAPACITY + 1):
        bench.step([bench.request(1, name=f"r{i}", **{TRACE: f"key{i}"})])
    assert bench.wrapper.gates.trace("key0") is None
    assert bench.wrapper.gates.trace(f"key{CAPACITY}") is not None


@pytest.mark.parametrize("key", [5, None, ["a"], {"a": 1}])
def test_a_key_that_is_no_text_traces_nothing(bench, key):
    bench.compose(0, bench.layout_of("arrow"))
    bench.step([bench.request(1, **{TRACE: key})])
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
