"""The segment path against a loop over tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

SLOTS = 5
WORKLOADS: dict[str, Callable[[int, torch.Generator], torch.Tensor]] = {
    "distinct": lambda n, g: torch.arange(n) % SLOTS,
    "uniform": lambda n, g: torch.randint(-1, SLOTS, (n,), generator=g),
    "zipf": lambda n, g: torch.multinomial(1 / torch.arange(1.0, SLOTS + 2), n, True, generator=g) - 1,
    "identical": lambda n, g: torch.full((n,), 3),
    "base only": lambda n, g: torch.full((n,), -1),
    "one request of the base model among many": lambda n, g: torch.where(torch.arange(n) == n // 2, -1, 4),
}


def loop(bench, group, x, index, y):
    """`y[t] += B_s A_s x[t]`, module by module."""
    y = y.clone()
    for t, slot in enumerate(index.tolist()):
        start = 0
        for module, width in zip(group.modules, group.widths, strict=True):
            if slot >= 0 and module in bench.factors[slot]:
                A, B = bench.factors[slot][module]
                y[t, start : start + width] += B @ (A @ x[t])
            start += width
    return y


@pytest.fixture
def filled(bench):
    """Ranks 1 to 16; slot 1 has a rank for each module and lacks some, slot 2 has one module only."""
    modules = [module for group in bench.groups for module in group.modules]
    bench.fill(0, bench.random(0, 1))
    bench.fill(1, bench.random(1, {module: 1 + i % 7 for i, module in enumerate(modules) if i % 3}))
    bench.fill(2, bench.random(2, {modules[0]: 4}))
    bench.fill(3, bench.random(3, 8))
    bench.fill(4, bench.random(4, 16))
    return bench


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_every_token_gets_its_own_adapter(filled, workload, tokens):
    g = torch.Generator().manual_seed(tokens)
    index = WORKLOADS[workload](tokens, g)
    filled.map(index)
    for group in filled.groups[:4]:
        x = torch.randn(tokens, group.d_in, generator=g)
        y = torch.randn(tokens, sum(group.widths), generator=g)
        expected = loop(filled, group, x, index, y)
        torch.testing.assert_close(filled.linear(group, x, y.clone()), expected)
        torch.testing.assert_close(filled.sharded(group, x), expected - y, atol=1e-5, rtol=1e-5)


def test_tokens_without_an_adapter_are_left_to_the_bit(filled):
    filled.map(torch.tensor([-1, 0, -1]))
    group = filled.groups[0]
    x, y = torch.randn(3, group.d_in), torch.randn(3, sum(group.widths))
    after = filled.linear(group, x, y.clone())
    assert torch.equal(after[[0, 2]], y[[0, 2]])
    assert not torch.equal(after[1], y[1])


def test_a_slot_that_changes_hands_has_nothing_of_its_last_adapter(filled):
    filled.fill(3, filled.random(7, 2))
    index = torch.tensor([3, 3, -1])
    filled.map(index)
    group = filled.groups[0]
    x, y = torch.randn(3, group.d_in), torch.zeros(3, sum(group.widths))
    torch.testing.assert_close(filled.linear(group, x), loop(filled, group, x, index, y))


@pytest.mark.parametrize("model", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_model_and_adapters_may_differ_in_precision(filled, model, adapters):
    index = torch.tensor([3, 4, -1, 3, 1, 1])
    filled.cast(adapters)
    for slot in (1, 3, 4):
        filled.fill(slot, filled.factors[slot])
    filled.map(index)
    group = filled.groups[0]
    x, y = torch.randn(6, group.d_in), torch.zeros(6, sum(group.widths))
    expected = loop(filled, group, x, index, y)
    found = filled.linear(group, x.to(model), y.to(model))
    assert found.dtype == model
    torch.testing.assert_close(found.float(), expected, atol=0.1, rtol=0.05)
