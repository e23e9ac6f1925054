from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from router.adapter import Adapter
from router.loudness import OUTSIDE, USUAL, Loudness, against, layer_of, loudness
from tests.router.conftest import deltas

MakeAdapter = Callable[..., Path]
Q, V = "model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.v_proj"

pytestmark = pytest.mark.usefixtures("one_thread")


def made(scale: float, layers: int = 2, seed: int = 0) -> Loudness:
    """Norms of an adapter about as loud as `scale`."""
    rng = np.random.default_rng(seed)
    modules = [each.format(layer) for layer in range(layers) for each in (Q, V)]
    norms = {module: float(scale * np.exp(rng.normal(0, 0.2))) for module in modules}
    return Loudness(norms, {module: norm / 2 for module, norm in norms.items()})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"r": 40, "lora_alpha": 3},  # more than d_in: of a rank that it cannot have
        {"r": 5, "use_rslora": True, "target_modules": "all-linear"},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 1}, "alpha_pattern": {"v_proj": 64}},
    ],
    ids=["plain", "full rank", "rslora", "patterns"],
)
def test_norms_are_those_of_the_updates_that_peft_forms(
    make_adapter: MakeAdapter, tmp_path: Path, options: dict[str, object]
) -> None:
    folder = make_adapter(tmp_path / "adapter", seed=5, **options)
    found = loudness(Adapter(folder))
    dense = {name.removeprefix("base_model.model."): dW for name, dW in deltas(folder).items()}
    assert found.frobenius.keys() == dense.keys()
    for module, dW in dense.items():
        assert found.frobenius[module] == pytest.approx(float(dW.norm()), rel=1e-5)
        assert found.spectral[module] == pytest.approx(float(torch.linalg.svdvals(dW)[0]), rel=1e-5)
    assert found.norm == pytest.approx(float(torch.cat([dW.flatten() for dW in dense.values()]).norm()), rel=1e-5)
    assert found.peak == max(found.spectral.values())
    layers = found.layers()
    assert list(layers) == [0, 1]
    assert math.hypot(*layers.values()) == pytest.approx(found.norm)
    assert json.loads(json.dumps(found.json()))["layers"] == {str(layer): norm for layer, norm in layers.items()}


def test_ten_times_as_loud_is_far_from_the_peers_and_an_ordinary_one_is_not() -> None:
    peers = [made(1.0, seed=seed) for seed in range(9)]
    ordinary, loud, quiet = (against(made(scale, seed=50), peers) for scale in (1.0, 10.0, 0.1))
    assert all(abs(z) < 3 for z in (ordinary.norm, ordinary.peak) if z is not None)
    assert loud.norm is not None
    assert loud.norm > 8
    assert quiet.norm == pytest.approx(-loud.norm, abs=2)
    assert loud.loudest == max(loud.norm, loud.peak or 0, *(z for z in loud.layers.values() if z))
    assert json.loads(json.dumps(loud.json()))["layers"].keys() == {"0", "1"}


def test_one_loud_layer_is_found_where_the_whole_is_ordinary() -> None:
    peers = [made(1.0, layers=40, seed=seed) for seed in range(9)]
    mine = made(1.0, layers=40, seed=50)
    odd = {module: norm * (4 if ".7." in module else 1) for module, norm in mine.frobenius.items()}
    found = against(Loudness(odd, mine.spectral), peers)
    assert found.norm is not None
    assert found.norm < 3
    loudest = max(found.layers, key=lambda layer: found.layers[layer] or 0)
    assert loudest == 7
    assert (found.layers[7] or 0) > 5


def test_peers_that_are_all_alike_do_not_make_a_little_more_an_outlier() -> None:
    peers = [made(1.0)] * 6
    found = against(made(1.2), peers)
    assert found.norm == pytest.approx(math.log(1.2) / USUAL)


def test_few_peers_are_not_enough_and_those_that_change_nothing_are_none() -> None:
    nothing = Loudness({Q.format(0): 0.0}, {Q.format(0): 0.0})
    found = against(made(10.0), [*(made(1.0, seed=seed) for seed in range(4)), nothing, nothing])
    assert (found.norm, found.peak, found.loudest) == (None, None, None)
    assert set(found.layers.values()) == {None}


def test_a_layer_is_compared_with_peers_that_adapt_it() -> None:
    peers = [made(1.0, layers=1, seed=seed) for seed in range(9)]
    assert against(made(1.0, layers=2), peers).layers[1] is None


def test_what_changes_nothing_and_what_is_no_number_are_as_far_as_can_be() -> None:
    peers = [made(1.0, seed=seed) for seed in range(9)]
    silent, broken = (against(Loudness({"a": n, "b": 0.0}, {"a": n, "b": 0.0}), peers) for n in (0.0, math.nan))
    assert silent.norm == silent.peak == -1000
    assert broken.norm == broken.peak == 1000


def test_layers_are_read_from_the_modules_paths() -> None:
    assert layer_of("model.layers.31.mlp.experts.2.down_proj") == 31
    assert layer_of("transformer.h.4.attn.c_attn") == 4
    assert layer_of("lm_head") == OUTSIDE
