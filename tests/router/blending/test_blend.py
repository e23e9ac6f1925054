"""A blend as a folder: what is in it, that it is the same for the same members, and what is refused."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters_registry.base import BaseSpec
from adapters_registry.lora import CONFIG, WEIGHTS
from adapters_registry.validate import inspect
from router.adapter import Adapter
from router.blending import LINEAGE, OPERATORS, BlendError, blend, blend_digest
from router.blending import folder as blend_folder
from router.composite import Part

MakePart = Callable[..., Part]
SETTINGS: dict[str, dict[str, Any]] = {"layer_swap": {"layers": {"adapter0": "0"}}}


def with_statistics(parts: list[Part], kind: str | None) -> list[Part]:
    if kind is None:
        return parts
    found = []
    for k, part in enumerate(parts):
        adapter = Adapter(part.path)
        random = torch.Generator().manual_seed(k)
        tensors = {}
        for module in adapter.modules:
            d_out, d_in = adapter.shape(module)
            x = torch.randn(3 * d_in, d_in, generator=random)
            tensors[module] = x.mT @ x if kind == "gram" else torch.rand(d_out, d_in, generator=random)
        found.append(replace(part, tensors={kind: tensors}))
    return found


def updates(folder: Path) -> dict[str, Tensor]:
    adapter = Adapter(folder)
    return {module: adapter.dense(module) for module in adapter.modules}  # type: ignore[misc]


def refused(tmp_path: Path, *arguments: Any, **options: Any) -> str:
    with pytest.raises(BlendError) as caught:
        blend(tmp_path / "blend", *arguments, **{"max_rank": 64, **options})
    assert list(tmp_path.glob("*blend*")) == []
    return str(caught.value)


@pytest.mark.parametrize("name", list(OPERATORS))
def test_the_same_members_give_the_same_bytes_in_any_order(tmp_path: Path, parts: list[Part], name: str) -> None:
    members = with_statistics(parts[:3], OPERATORS[name].statistic)
    given, weights = SETTINGS.get(name, {}), [0.5, 0.3, 0.2]
    report = blend(tmp_path / "one", members, weights, name, given, max_rank=64)
    again = blend(tmp_path / "other", members[::-1], weights[::-1], name, given, max_rank=64)
    assert report == again
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted([CONFIG, WEIGHTS, LINEAGE])
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
    assert {tensor.dtype for tensor in load_file(tmp_path / "one" / WEIGHTS).values()} == {torch.float32}
    config = json.loads((tmp_path / "one" / CONFIG).read_text())
    assert config["r"] == config["lora_alpha"] == report.rank <= 12
    assert all(bool(update.isfinite().all()) for update in updates(tmp_path / "one").values())


@pytest.mark.parametrize("name", ["cat", "ties"])
def test_the_registry_would_take_a_blend_as_an_expert(
    tmp_path: Path, parts: list[Part], base: BaseSpec, name: str
) -> None:
    report = blend(tmp_path / "blend", parts, [0.4, 0.3, 0.2, 0.1], name, max_rank=64)
    found = inspect(tmp_path / "blend", base, allow_base_mismatch=True)
    assert (found.rank, found.target_modules) == (report.rank, ("q_proj", "v_proj"))


@pytest.mark.parametrize("name", list(OPERATORS))
def test_a_single_member_is_itself_whatever_the_operator(tmp_path: Path, parts: list[Part], name: str) -> None:
    members = with_statistics(parts[:1], OPERATORS[name].statistic)
    given = {"layers": {"adapter0": "0-1"}} if name == "layer_swap" else {}
    blend(tmp_path / "blend", members, [1.0], name, given, max_rank=64)
    torch.testing.assert_close(updates(tmp_path / "blend"), updates(parts[0].path), rtol=1e-5, atol=1e-5)


def test_members_of_weight_zero_take_no_part(tmp_path: Path, parts: list[Part]) -> None:
    """One that is left is scaled by an absolute weight; of a relative one only the sign counts."""
    whole = updates(parts[1].path)
    for operator, settings, factor in [
        ("cat", {}, -0.5),
        ("dare_linear", {}, -0.5),
        ("task_arithmetic", {"scale": 0.3}, -0.15),
        ("ties", {}, -1.0),
        ("ties", {"mean": "count"}, -0.5),
        ("pcb", {}, -1.0),
    ]:
        folder = tmp_path / f"{operator}{len(settings)}"
        blend(folder, parts[:3], [0.0, -0.5, 0.0], operator, settings, max_rank=64)
        expected = {module: factor * update for module, update in whole.items()}
        torch.testing.assert_close(updates(folder), expected, rtol=1e-5, atol=1e-5)
    blend(tmp_path / "smear", parts[:3], [0.0, 0.5, 0.0], "smear", max_rank=64)
    torch.testing.assert_close(updates(tmp_path / "smear"), whole, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="session")
def mixed(make_adapter: Callable[..., Path], part: MakePart, tmp_path_factory: pytest.TempPathFactory) -> list[Part]:
    """Members that differ in rank, alpha, rsLoRA, patterns and target modules."""
    root = tmp_path_factory.mktemp("mixed")
    options: list[dict[str, Any]] = [
        {"r": 2, "lora_alpha": 7, "target_modules": ["q_proj", "up_proj"]},
        {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        {"r": 4, "lora_alpha": 4, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.0.self_attn.q_proj": 9}},
    ]
    return [part(make_adapter(root / f"m{k}", seed=k, **each)) for k, each in enumerate(options)]


def test_members_may_differ_in_rank_scale_and_modules(tmp_path: Path, mixed: list[Part]) -> None:
    weights = [0.5, -0.25, 1.5]
    report = blend(tmp_path / "blend", mixed, weights, max_rank=64)
    assert (report.rank, report.cut, report.discarded) == (13, 0, 0.0)
    expected: dict[str, Tensor] = {}
    for member, weight in zip(mixed, weights, strict=True):
        for module, update in updates(member.path).items():
            expected[module] = expected.get(module, torch.zeros_like(update)) + weight * update
    torch.testing.assert_close(updates(tmp_path / "blend"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "layer_swap"])
def test_every_operator_takes_members_that_differ(tmp_path: Path, mixed: list[Part], name: str) -> None:
    members = with_statistics(mixed, OPERATORS[name].statistic)
    blend(tmp_path / "blend", members, [0.5, 0.2, 0.3], name, max_rank=64)
    found = updates(tmp_path / "blend")
    assert found.keys() == {module for member in mixed for module in updates(member.path)}
    assert all(bool(update.isfinite().all()) and bool(update.any()) for update in found.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_members_of_half_precision_are_merged_in_float32(
    tmp_path: Path, adapters: list[Path], part: MakePart, dtype: torch.dtype
) -> None:
    half = shutil.copytree(adapters[0], tmp_path / "half")
    save_file({key: value.to(dtype) for key, value in load_file(half / WEIGHTS).items()}, half / WEIGHTS)
    members = [part(half), part(adapters[1])]
    blend(tmp_path / "blend", members, [0.3, 0.7], max_rank=64)
    first, second = updates(half), updates(adapters[1])
    expected = {module: 0.3 * first[module] + 0.7 * second[module] for module in first}
    torch.testing.assert_close(updates(tmp_path / "blend"), expected, rtol=1e-6, atol=1e-6)


def test_over_the_engine_s_limit_the_best_low_rank_is_kept_and_the_loss_told(tmp_path: Path, parts: list[Part]) -> None:
    weights = [0.4, 0.3, 0.2, 0.1]
    blend(tmp_path / "whole", parts, weights, max_rank=16)
    report = blend(tmp_path / "cut", parts, weights, max_rank=5)
    assert (report.rank, report.modules, report.cut) == (5, 4, 4)
    lost, total, worst = 0.0, 0.0, 0.0
    cut = updates(tmp_path / "cut")
    for module, update in updates(tmp_path / "whole").items():
        U, S, Vt = torch.linalg.svd(update)
        torch.testing.assert_close(cut[module], U[:, :5] * S[:5] @ Vt[:5], rtol=1e-4, atol=1e-4)
        energy = S.square()
        lost, total = lost + float(energy[5:].sum()), total + float(energy.sum())
        worst = max(worst, float(energy[5:].sum() / energy.sum()))
    assert report.discarded == pytest.approx(lost / total, rel=1e-4)
    assert report.worst == pytest.approx(worst, rel=1e-4)
    lineage = json.loads((tmp_path / "cut" / LINEAGE).read_text())
    assert lineage["discarded"] == report.discarded
    assert [member["weight"] for member in lineage["members"]] != []


def test_svd_has_the_largest_member_s_rank_and_any_operator_can_be_given_one(
    tmp_path: Path, parts: list[Part], mixed: list[Part]
) -> None:
    assert blend(tmp_path / "svd", mixed, [1.0, 1.0, 1.0], "svd", max_rank=64).rank == 8
    assert blend(tmp_path / "ties", parts, [1.0] * 4, "ties", max_rank=64).rank == 16
    assert blend(tmp_path / "cut", parts, [1.0] * 4, "ties", {"rank": 3}, max_rank=64).rank == 3


def test_masks_depend_on_the_seed(tmp_path: Path, parts: list[Part]) -> None:
    for seed in (0, 1):
        blend(tmp_path / str(seed), parts[:2], [0.5, 0.5], "dare_linear", {"seed": seed}, max_rank=64)
    one, other = (load_file(tmp_path / str(seed) / WEIGHTS) for seed in (0, 1))
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_a_digest_stands_for_all_that_decides_the_content(parts: list[Part]) -> None:
    members, weights = parts[:2], [0.6, 0.4]
    digest = blend_digest(members, weights, max_rank=64)
    assert digest == blend_digest(members[::-1], weights[::-1], "cat", {}, max_rank=64)
    fisher = with_statistics(members, "fisher")
    others = [
        blend_digest(members, [0.4, 0.6], max_rank=64),
        blend_digest(members[:1], weights[:1], max_rank=64),
        blend_digest([parts[0], parts[2]], weights, max_rank=64),
        blend_digest(members, weights, max_rank=8),
        blend_digest(members, weights, "cat", {"rank": 4}, max_rank=64),
        blend_digest(members, weights, "ties", max_rank=64),
        blend_digest(members, weights, "ties", {"density": 0.3}, max_rank=64),
        blend_digest(fisher, weights, "fisher", max_rank=64),
        blend_digest(fisher[::-1][:1] + members[:1], weights[::-1], "fisher", max_rank=64),
    ]
    assert len({digest, *others}) == 1 + len(others)
    assert blend_digest(fisher, weights, max_rank=64) == digest  # statistics that are not used do not count
    assert blend_digest(members, weights, "ties", max_rank=64) == blend_digest(
        members, weights, "ties", {"density": 0.2}, max_rank=64
    )


def test_statistics_also_speak_of_modules_that_a_member_does_not_adapt(tmp_path: Path, mixed: list[Part]) -> None:
    """There its dW is zero, and by its statistics it pulls the mean towards zero."""
    members = with_statistics(mixed[:2], "fisher")
    module = next(module for module in Adapter(mixed[0].path).modules if "up_proj" in module)
    blend(tmp_path / "without", members, [0.5, 0.5], "fisher", max_rank=64)
    torch.testing.assert_close(
        updates(tmp_path / "without")[module], updates(mixed[0].path)[module], rtol=1e-4, atol=1e-4
    )
    speaking = {**members[1].tensors["fisher"], module: torch.full((48, 32), 1e6)}
    members[1] = replace(members[1], tensors={"fisher": speaking})
    blend(tmp_path / "with", members, [0.5, 0.5], "fisher", max_rank=64)
    assert float(updates(tmp_path / "with")[module].abs().max()) < 1e-3


# What is refused


def test_an_unknown_operator_is_refused_with_those_that_there_are(tmp_path: Path, parts: list[Part]) -> None:
    text = refused(tmp_path, parts, [1.0] * 4, "average")
    assert "No operator 'average'" in text
    assert all(name in text for name in OPERATORS)


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ([1.0, float("nan")], "'adapter1@.*' has weight nan"),
        ([float("inf"), 1.0], "has weight inf"),
        ([0.0, 0.0], "All weights are zero"),
        ([1.0], "2 members and 1 weights"),
        ([1.0, 1.0, 1.0], "2 members and 3 weights"),
    ],
)
def test_weights_that_mean_nothing_are_refused(
    tmp_path: Path, parts: list[Part], weights: list[float], reason: str
) -> None:
    with pytest.raises(BlendError, match=reason):
        blend(tmp_path / "blend", parts[:2], weights, max_rank=64)
    with pytest.raises(BlendError, match=reason):
        blend_digest(parts[:2], weights, max_rank=64)


@pytest.mark.parametrize(
    ("operator", "settings", "reason"),
    [
        ("ties", {"density": 0.0}, "greater than 0"),
        ("ties", {"density": 1.2}, "less than or equal to 1"),
        ("ties", {"density": float("nan")}, "density"),
        ("ties", {"density": "half"}, "valid number"),
        ("ties", {"mean": "median"}, "'weights' or 'count'"),
        ("cat", {"density": 0.5}, "Its settings: rank"),
        ("cat", {"rank": 0}, "rank"),
        ("della", {"density": 0.9, "epsilon": 0.2}, "leaves \\(0, 1\\)"),
        ("dare_ties", {"seed": -1}, "seed"),
        ("layer_swap", {}, "layers"),
        ("layer_swap", {"layers": {"adapter0": "3-1"}}, "no range of layers"),
        ("layer_swap", {"layers": {"adapter0": "all"}}, "no layer or range"),
        ("layer_swap", {"layers": {"adapter0": "0", "adapter1": "0-1"}}, "layer 0 is given to both"),
        ("layer_swap", {"layers": {"poetry": "0"}}, "'poetry', which is no member"),
        ("layer_swap", {"layers": {"adapter0": "5"}}, "no member adapts anything there"),
    ],
)
def test_settings_out_of_range_are_refused(
    tmp_path: Path, parts: list[Part], operator: str, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(BlendError, match=reason):
        blend(tmp_path / "blend", parts[:2], [0.5, 0.5], operator, settings, max_rank=64)


def test_smear_takes_a_distribution(tmp_path: Path, parts: list[Part]) -> None:
    assert "no weight may be negative" in refused(tmp_path, parts[:2], [0.5, -0.5], "smear")


def test_a_rank_that_does_not_fit_is_refused(tmp_path: Path, parts: list[Part]) -> None:
    assert "over the engine's limit of 8" in refused(tmp_path, parts[:2], [1, 1], "svd", {"rank": 9}, max_rank=8)
    assert "largest rank is 0" in refused(tmp_path, parts[:2], [1, 1], max_rank=0)


@pytest.mark.parametrize("name", ["fisher", "regmean"])
def test_statistics_that_are_missing_or_wrong_are_refused(tmp_path: Path, parts: list[Part], name: str) -> None:
    kind = OPERATORS[name].statistic
    assert kind is not None
    members = with_statistics(parts[:2], kind)
    assert f"carries no '{kind}' statistics" in refused(tmp_path, [members[0], parts[1]], [1, 1], name)
    tensors: dict[str, Any] = dict(members[1].tensors[kind])
    module = next(iter(tensors))

    def changed(tensor: Any) -> list[Part]:
        return [members[0], replace(members[1], tensors={kind: {**tensors, module: tensor}})]

    assert f"for {module}; it should be" in refused(tmp_path, changed(np.zeros((2, 3), np.float32)), [1, 1], name)
    spoiled = np.full(tuple(tensors[module].shape), np.nan, np.float32)
    assert "NaN or infinite" in refused(tmp_path, changed(spoiled), [1, 1], name)
    del tensors[module]
    fewer = [members[0], replace(members[1], tensors={kind: tensors})]
    assert f"lacks the '{kind}' statistics of {module}" in refused(tmp_path, fewer, [1, 1], name)


def test_members_that_do_not_fit_together_are_refused_with_every_reason(
    tmp_path: Path, parts: list[Part], part: MakePart, make_adapter: Callable[..., Path]
) -> None:
    from transformers import LlamaConfig

    wider = LlamaConfig(hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    other = part(make_adapter(tmp_path / "wider", llama=wider), "wider")
    assert "for different base models: model.layers" in refused(tmp_path, [parts[0], other], [1, 1])
    named = [replace(parts[0], base_model="llama"), replace(parts[1], base_model="qwen")]
    assert "llama: adapter0" in refused(tmp_path, named, [1, 1])
    text = refused(tmp_path, [parts[0], parts[0]], [1.0, float("nan")], "mean")
    assert "occurs 2 times" in text
    assert "has weight nan" in text
    assert "No operator 'mean'" in text
    assert "at least one member" in refused(tmp_path, [], [])
    missing = replace(parts[1], path=tmp_path / "nowhere")
    assert "cannot be read" in refused(tmp_path, [parts[0], missing], [1, 1])


def test_a_damaged_or_unusual_member_is_refused(tmp_path: Path, adapter: Path, part: MakePart) -> None:
    weights = load_file(adapter / WEIGHTS)
    name = next(iter(weights))
    half = {key: value for key, value in weights.items() if key != name}
    save_file(half, adapter / WEIGHTS)
    assert "only one of the two factors" in refused(tmp_path, [part(adapter)], [1])
    save_file({}, adapter / WEIGHTS)
    assert "adapts no module" in refused(tmp_path, [part(adapter)], [1])
    save_file({**weights, "base_model.model.model.layers.0.lora_magnitude_vector": torch.ones(3)}, adapter / WEIGHTS)
    assert "more than plain LoRA factors" in refused(tmp_path, [part(adapter)], [1])


def test_when_writing_fails_nothing_is_left(tmp_path: Path, parts: list[Part], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, shapes: object, tensors: Iterator[Tensor]) -> None:
        path.write_bytes(next(tensors).numpy().tobytes())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(blend_folder, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        blend(tmp_path / "blend", parts, [1.0] * 4, max_rank=64)
    assert list(tmp_path.iterdir()) == []


def test_a_blend_never_overwrites_another(tmp_path: Path, parts: list[Part]) -> None:
    blend(tmp_path / "blend", parts[:2], [1.0, 1.0], max_rank=64)
    before = (tmp_path / "blend" / WEIGHTS).read_bytes()
    with pytest.raises(OSError, match="not empty"):
        blend(tmp_path / "blend", parts[2:], [1.0, 1.0], max_rank=64)
    assert (tmp_path / "blend" / WEIGHTS).read_bytes() == before
    shutil.rmtree(tmp_path / "blend")
    assert list(tmp_path.iterdir()) == []


def test_a_blend_that_is_there_already_stays(
    tmp_path: Path, parts: list[Part], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = blend(tmp_path / "blend", parts, [1.0] * 4, "svd", max_rank=64)
    monkeypatch.setattr(blend_folder, "write_tensors", None)
    assert blend(tmp_path / "blend", parts, [1.0] * 4, "svd", max_rank=64) == first
    assert [each.name for each in tmp_path.iterdir()] == ["blend"]


def test_of_two_that_build_the_same_the_second_finds_the_first_s(
    tmp_path: Path, parts: list[Part], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, other = tmp_path / "blend", tmp_path / "other"
    quicker = blend(other, parts, [1.0] * 4, max_rank=64)
    write = blend_folder.write_tensors

    def slow(path: Path, *args: Any) -> None:
        write(path, *args)
        other.rename(target)

    monkeypatch.setattr(blend_folder, "write_tensors", slow)
    assert blend(target, parts, [1.0] * 4, max_rank=64) == quicker
    assert [each.name for each in tmp_path.iterdir()] == ["blend"]


def test_what_killed_processes_left_is_removed_and_what_others_work_on_stays(tmp_path: Path, parts: list[Part]) -> None:
    left, held, fresh = (tmp_path / f".blend-{name * 8}" for name in "abc")
    for draft in (left, held, fresh):
        draft.mkdir()
        (draft / WEIGHTS).write_bytes(b"half")
    for draft in (left, held):
        os.utime(draft, (0, 0))
    lock = os.open(held, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    blend(tmp_path / "blend", parts, [1.0] * 4, max_rank=64)
    os.close(lock)
    assert sorted(tmp_path.iterdir()) == [held, fresh, tmp_path / "blend"]
