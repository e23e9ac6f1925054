"""What is refused before it gets into the engine, and how layers of a model become places for adapters."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from router.gating.layout import KEY, MARK
from serving.engine.loading import AdapterRefused, Weights, read_layout, reasons_against
from serving.engine.private import group_of, places

PLACES: dict[str, tuple[int, int | None]] = {"layers.0.q": (8, 4), "layers.0.odd": (8, None)}


def against(module: str, A: Any, B: Any, rank: int, **options: Any) -> list[str]:
    return reasons_against({module: Weights(A, B, rank)}, PLACES, 16, **options)


def test_what_fits_is_not_refused():
    assert not against("layers.0.q", (2, 8), (4, 2), 2)
    assert not against("layers.0.odd", (2, 8), (99, 2), 2)


@pytest.mark.parametrize(
    ("weights", "why"),
    [
        (("layers.9.q", (2, 8), (4, 2), 2), "no such module"),
        (("layers.0.q", (2, 7), (4, 2), 2), r"want A \(2, 8\) and B \(4, 2\)"),
        (("layers.0.q", (2, 8), (5, 2), 2), r"B \(5, 2\)"),
        (("layers.0.q", (3, 8), (4, 3), 2), "declared rank"),
        (("layers.0.q", (2, 8), (4, 3), 2), "declared rank"),
        (("layers.0.q", None, (4, 2), 2), "lacks lora_A"),
        (("layers.0.q", (2, 8), None, 2), "lacks lora_B"),
        (("layers.0.q", (32, 8), (4, 32), 32), "limit is 16"),
    ],
)
def test_every_misfit_is_named(weights, why):
    import re

    (reason,) = against(*weights)
    assert re.search(why, reason)


def test_a_process_with_some_layers_only_takes_others_on_trust():
    assert not against("layers.9.q", (2, 8), (4, 2), 2, complete=False)


def test_an_adapter_of_nothing_is_refused():
    assert reasons_against({}, PLACES, 16) == ["It adapts no module."]


def test_a_plain_adapter_or_none_has_no_layout(tmp_path):
    assert read_layout(tmp_path) is None
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "init_lora_weights": True}))
    assert read_layout(tmp_path) is None


@pytest.mark.parametrize(
    ("content", "why"),
    [("{", "cannot be read"), ("[]", "no object"), (json.dumps({"init_lora_weights": MARK}), f"no '{KEY}'")],
)
def test_half_a_composite_is_refused(tmp_path, content, why):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(AdapterRefused, match=why):
        read_layout(tmp_path)


def layer(widths: tuple[int, ...], **base: Any) -> SimpleNamespace:
    A = tuple(torch.zeros(2, 1, 4, 8) for _ in widths)
    B = tuple(torch.zeros(2, 1, width, 4) for width in widths)
    return SimpleNamespace(
        lora_a_stacked=A, lora_b_stacked=B, output_slices=widths, base_layer=SimpleNamespace(input_size=8, **base)
    )


def manager(**packed: list[str]) -> SimpleNamespace:
    return SimpleNamespace(packed_modules=packed)


def test_query_key_and_value_are_three_places_even_where_ranks_share_key_heads():
    qkv = layer(
        (8, 4, 6), total_num_heads=4, total_num_kv_heads=1, head_size=4, v_head_size=6, output_sizes=[16, 8, 12]
    )
    packs = manager(qkv=["q", "k", "v"])
    assert places("qkv", qkv, packs) == [("q", (8, 16)), ("k", (8, 4)), ("v", (8, 6))]
    assert group_of(0, "qkv", qkv, packs).modules == ("q", "k", "v")


def test_a_layer_that_adapters_know_as_one_module_is_one_place():
    fused = layer((12, 12), output_sizes=[12, 12], output_size=24)
    assert places("gate_up", fused, manager()) == [("gate_up", (8, 24))]
    assert group_of(0, "gate_up", fused, manager()).modules == ("gate_up", "gate_up")


def test_a_module_for_several_slices_has_no_width_of_its_own():
    odd = layer((4, 4, 4), output_sizes=[4, 4, 4], output_size=12)
    packs = manager(in_proj=["qk", "z"])
    assert places("in_proj", odd, packs) == [("qk", (8, None)), ("z", (8, None))]
    assert group_of(0, "in_proj", odd, packs).modules == ("in_proj.0", "in_proj.1", "in_proj.2")


def test_a_plain_layer_is_its_own_module():
    down = layer((6,), output_size=6)
    assert places("down", down, manager()) == [("down", (8, 6))]
