"""Every gate, from the adapter folders to the modules' outputs, against its slow twin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import ArrowConfig
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from torch import nn

from router.gating import GATES

Q, K, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")

WORLDS: dict[str, list[dict[str, Any]]] = {
    "equal": [{"seed": k, "ranks": 4} for k in range(4)],
    "two": [{"seed": 10 + k, "ranks": 3} for k in range(2)],
    "rank one": [{"seed": 20 + k, "ranks": 1} for k in range(3)],
    "over d_out": [{"seed": 30 + k, "ranks": 12} for k in range(2)],
    "nobody in k": [{"seed": 50 + k, "ranks": 2, "zero": (K,)} for k in range(3)],
    "mixed": [
        {"seed": 40, "ranks": 4, "rslora": True},
        {"seed": 41, "ranks": [6, 2], "modules": (Q, V), "alpha": 3.0},
        {"seed": 42, "ranks": 2},
        {"seed": 43, "ranks": [1, 5, 3], "rslora": True, "alpha": 2.0},
        {"seed": 44, "ranks": 3, "modules": (K,)},
    ],
}
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "arrow": [{"centred": True}],
    "spectr": [{"singular_values": False}, {"centred": True}],
    "lag": [{"top_k": 1}, {"top_k": 2}, {"top_k": 2, "singular_values": False}, {"top_k": 2, "shared": True}],
    "smile": [{"k_gate": 2}, {"k_gate": 2, "centred": True}],
    "phatgoose": [{"top_k": None}],
    "meteora": [{"top_k": None}],
}
COMMON: list[dict[str, Any]] = [
    {},
    {"top_k": 2},
    {"top_k": 99, "temperature": 0.5},
    {"normalise": "unit"},
    {"normalise": "rms", "top_k": 3},
    {"normalise": "zscore"},
    {"normalise": "zscore", "centred": True},
    {"shared": True},
    {"shared": True, "top_k": 1, "normalise": "zscore"},
]
CASES = [
    (gate, settings)
    for gate in ("arrow", "spectr", "lag", "smile", "phatgoose", "meteora")
    for settings in [*COMMON, *SETTINGS[gate]]
    if not (settings.get("centred") and gate in ("phatgoose", "meteora"))
]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("gate", "settings"), CASES, ids=str)
def test_a_gate_weighs_as_its_paper_says(
    world: str, gate: str, settings: dict[str, Any], workshop: Any, make_raw: Any, make_twin: Any
) -> None:
    experts = [make_raw(**options) for options in WORLDS[world]]
    twin = make_twin(experts, (Q, K, V), random(30, 24, seed=9).double() + 0.5)
    engine = workshop.engine(experts, gate, settings, workshop.statistics(twin, gate, settings))
    x = random(5, 24, seed=1)
    weights, outputs = engine(x)
    expected = torch.stack([twin.weights(gate, settings, each) for each in x.double()])
    torch.testing.assert_close(weights.double(), expected, atol=2e-5, rtol=0)
    for j in range(3):
        right = torch.stack([twin.output(expected[t], x[t].double())[j] for t in range(len(x))])
        torch.testing.assert_close(outputs[j].double(), right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("gate", [name for name in GATES if name not in ("probe", "evidence")])
def test_a_zero_input_changes_nothing_and_breaks_nothing(gate: str, workshop: Any, make_raw: Any) -> None:
    for normalise in ("none", "unit", "rms"):
        settings = {"normalise": normalise} if "normalise" in GATES[gate].Settings.model_fields else {}
        engine = workshop.engine([make_raw(k, 3) for k in range(3)], gate, settings)
        weights, outputs = engine(torch.zeros(2, 24))
        assert weights.isfinite().all()
        assert not any(output.any() for output in outputs)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_arrow_agrees_with_pefts_layer(top_k: int, workshop: Any, make_raw: Any) -> None:
    """With exact prototypes on both sides: PEFT's own come from 15 power iterations at a random start."""
    experts = [make_raw(k, 4) for k in range(4)]
    names = [f"task_{k}" for k in range(4)]
    config = ArrowConfig(top_k=top_k)
    config.task_adapter_names = names
    layer = ArrowLoraLinearLayer(24, config)
    x = random(6, 24, seed=2)
    engine = workshop.engine(experts, "arrow", {"top_k": top_k})
    _, outputs = engine(x)
    for j, module in enumerate((Q, K, V)):
        layer.prototypes = torch.stack([torch.linalg.svd(expert.delta(module)).Vh[0] for expert in experts]).float()
        A, B = nn.ModuleDict(), nn.ModuleDict()
        for name, expert in zip(names, experts, strict=True):
            for side, factor in zip((B, A), expert.factors[module], strict=True):
                side[name] = nn.Linear(*reversed(factor.shape), bias=False)
                side[name].weight.data = factor
        with torch.no_grad():
            theirs = layer(x[None], A, B, nn.Identity(), dict.fromkeys(names, 8.0 / 4))
        torch.testing.assert_close(outputs[j], theirs[0], atol=1e-5, rtol=1e-5)
