"""Composites: exact, the same bytes each time, refused with every reason, and read back with suspicion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from router.composite import CompositeError, Part, check_composite, compose, composite_digest, plan, statistics_key
from router.gating import gate_of

Q, K, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def parts(workshop: Any, make_raw: Any) -> list[Part]:
    made: list[Part] = workshop.parts([make_raw(0, 4), make_raw(1, [3, 2], (Q, V), rslora=True), make_raw(2, 2)])
    return made


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(CompositeError) as caught:
        plan(*arguments, **{"max_rank": 64, **options})
    assert caught.value.reasons
    return str(caught.value)


# Exact


@pytest.mark.parametrize("form", ["unit", "scaled"])
def test_any_weights_give_the_weighted_sum_of_the_experts(
    form: str, workshop: Any, make_raw: Any, make_twin: Any
) -> None:
    experts = [make_raw(0, 4), make_raw(1, [3, 2], (Q, V), rslora=True, alpha=5), make_raw(2, [1, 6, 2], alpha=3)]
    engine = workshop.engine(experts, "arrow" if form == "unit" else "spectr")
    assert engine.layout.form == form
    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(5))
    weights = torch.randn(6, 3, 3, generator=torch.Generator().manual_seed(6))
    z = engine.shrink(x)
    engine.gate.blocks.multiply(z, weights)
    twin = make_twin(experts, (Q, K, V), x)
    for j, B in enumerate(engine.B):
        right = torch.stack([twin.output(weights[t].double(), x[t].double())[j] for t in range(6)])
        torch.testing.assert_close((z[:, j] @ B.T).double(), right, atol=2e-5, rtol=2e-5)


def test_rows_of_the_unit_form_are_orthonormal_and_of_the_scaled_form_s_sigma_times_that(
    workshop: Any, make_raw: Any
) -> None:
    experts = [make_raw(0, 4), make_raw(1, 3, rslora=True)]
    unit, scaled = workshop.engine(experts, "arrow"), workshop.engine(experts, "lag", {"top_k": 1})
    for j in range(3):
        for start, rows in zip((0, 4), (4, 3), strict=True):
            V_t = unit.A[j][start : start + rows]
            torch.testing.assert_close(V_t @ V_t.T, torch.eye(rows), atol=1e-5, rtol=1e-5)
            scale = scaled.table.scale[j, start : start + rows]
            torch.testing.assert_close(scaled.A[j][start : start + rows], scale[:, None] * V_t, atol=1e-5, rtol=1e-4)


def test_genknowsub_subtracts_exactly_also_where_only_one_adapts_a_module(
    workshop: Any, make_raw: Any, make_twin: Any
) -> None:
    raw = [make_raw(0, 4), make_raw(1, [3, 2], (Q, V)), make_raw(2, 2, (Q, K), rslora=True)]
    parts = workshop.parts(raw)
    general = Part("general@1", "g" * 64, parts[2].path)
    folder = workshop.folder / "out"
    layout = compose(folder, parts[:2], "constant", {"weights": [0.6, 0.4]}, max_rank=64, general=general)
    assert layout.blocks == (6, 5)
    weights = load_file(folder / WEIGHTS)
    for module in (Q, K, V):
        A, B = (weights[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
        start = 0
        for expert, rows in zip(raw[:2], layout.blocks, strict=True):
            right = torch.zeros(B.shape[0], 24, dtype=torch.float64)
            for sign, each in ((1, expert), (-1, raw[2])):
                if each.delta(module) is not None:
                    right += sign * each.delta(module)
            stacked = B[:, start : start + rows] @ A[start : start + rows]
            torch.testing.assert_close(stacked, right, atol=1e-5, rtol=1e-5)
            start += rows


def test_compression_is_the_best_of_its_rank_and_says_what_it_discards(workshop: Any, make_raw: Any) -> None:
    raw = [make_raw(0, 4), make_raw(1, 2)]
    parts = workshop.parts(raw)
    layout = compose(workshop.folder / "out", parts, "arrow", {}, max_rank=64, compress=2)
    assert layout.blocks == (2, 2)
    lost = total = 0.0
    weights = load_file(workshop.folder / "out" / WEIGHTS)
    for module in (Q, K, V):
        U, S, Vt = torch.linalg.svd(raw[0].delta(module), full_matrices=False)
        A, B = (weights[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
        best = U[:, :2] * S[:2] @ Vt[:2]
        torch.testing.assert_close(B[:, :2] @ A[:2], best, atol=1e-5, rtol=1e-5)
        lost, total = lost + float(S[2:].square().sum()), total + float(S.square().sum())
    [note] = layout.notes
    assert f"'{parts[0].id}' is compressed to rank 2, which discards {lost / total:.2%} of its energy" in note


def test_an_expert_whose_first_direction_is_hardly_defined_is_noted(workshop: Any, make_raw: Any) -> None:
    round_, sharp = make_raw(0, 3), make_raw(1, 3)
    for module, (B, A) in round_.factors.items():
        rows, columns = torch.linalg.qr(B).Q, torch.linalg.qr(A.T).Q.T  # so that all singular values are equal
        round_.factors[module] = (rows.contiguous(), columns.contiguous())
    parts = workshop.parts([round_, sharp])
    layout = compose(workshop.folder / "arrow", parts, "arrow", {}, max_rank=64)
    assert len(layout.notes) == 1
    assert f"'{parts[0].id}' has sigma_1 / sigma_2 under 1.1 in 3 of 3 modules" in layout.notes[0]
    assert check_composite(workshop.folder / "arrow").notes == layout.notes
    assert compose(workshop.folder / "spectr", parts, "spectr", {}, max_rank=64).notes == ()


def test_an_expert_that_was_never_trained_is_absent_and_noted(workshop: Any, make_raw: Any) -> None:
    experts = [make_raw(0, 2), make_raw(1, 2), make_raw(2, 2, zero=(Q, K, V))]
    engine = workshop.engine(experts, "arrow")
    assert "changes nothing" in engine.layout.notes[0]
    weights, _ = engine(torch.randn(4, 24))
    assert not weights[..., 2].any()


# The same bytes


def test_the_same_experts_give_the_same_bytes(parts: list[Part], tmp_path: Path) -> None:
    for name in ("one", "two"):
        compose(tmp_path / name, parts, "lag", {"top_k": 2}, max_rank=64)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def test_planning_and_composing_agree(parts: list[Part], tmp_path: Path) -> None:
    for gate in ("arrow", "lag", "phatgoose", "hilora", "constant"):
        made = compose(tmp_path / gate, parts, gate, {}, max_rank=64)
        assert made.model_copy(update={"notes": ()}) == plan(parts, gate, {}, max_rank=64)
        assert check_composite(tmp_path / gate) == made


def test_the_digest_changes_with_everything_that_changes_the_answer(parts: list[Part]) -> None:
    first, second, third = parts
    other = Part(second.id, "0" * 64, second.path, second.tensors)
    vectors = {module: vector + 1 for module, vector in second.tensors["phatgoose"].items()}
    trained = Part(second.id, second.digest, second.path, {"phatgoose": vectors})
    digests = [
        composite_digest([first, second], "arrow", {}),
        composite_digest([second, first], "arrow", {}),
        composite_digest([first, third], "arrow", {}),
        composite_digest([first, other], "arrow", {}),
        composite_digest([first, trained], "arrow", {}),
        composite_digest([first, second], "spectr", {}),
        composite_digest([first, second], "arrow", {"top_k": 1}),
        composite_digest([first, second], "arrow", {}, general=third),
        composite_digest([first, second], "arrow", {}, compress=2),
    ]
    assert len(set(digests)) == len(digests)
    assert composite_digest([first, second], "arrow", {"temperature": 1.0}) == digests[0], "a default is a default"
    assert all(len(digest) == 64 for digest in digests)


def test_a_module_that_fails_ends_the_build_and_leaves_the_process_as_it_was(
    parts: list[Part], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("router.composite.building.stack_module", fails)
    before = torch.get_num_threads()
    with pytest.raises(OSError, match="no space left"):
        compose(tmp_path / "out", parts, "arrow", {}, max_rank=64)
    assert torch.get_num_threads() == before
    with pytest.raises(CompositeError):
        check_composite(tmp_path / "out")


# Refused


def test_a_composite_has_several_different_experts(parts: list[Part]) -> None:
    assert "at least two experts; it got none" in refused([], "arrow", {})
    assert f"it got only '{parts[0].id}'" in refused(parts[:1], "arrow", {})
    assert f"'{parts[0].id}' occurs 2 times" in refused([*parts, parts[0]], "arrow", {})
    twin = Part("other@1", parts[0].digest, parts[0].path)
    assert f"{parts[0].id}, other@1 are the same adapter" in refused([*parts, twin], "arrow", {})


def test_experts_of_different_base_models_are_refused(workshop: Any, parts: list[Part], make_raw: Any) -> None:
    declared = json.loads((parts[1].path / CONFIG).read_text()) | {"base_model_name_or_path": "org/other"}
    (parts[1].path / CONFIG).write_text(json.dumps(declared))
    assert f"(org/base: {parts[0].id}, {parts[2].id}; org/other: {parts[1].id})" in refused(parts, "arrow", {})
    registered = [Part(part.id, part.digest, part.path, base_model="the base") for part in parts]
    assert plan(registered, "arrow", {}, max_rank=64), "what the registry accepted counts, not what a file says"
    wide = make_raw(7, 2)
    wide.factors[Q] = (wide.factors[Q][0], torch.randn(2, 30))
    [other] = workshop.parts([wide])
    message = refused([parts[0], other], "arrow", {})
    assert f"{Q} is 24 x 24 for the first and 24 x 30 for the second" in message


@pytest.mark.parametrize(
    ("module", "what"),
    [
        ("lm_head", "the output layer"),
        ("model.embed_tokens", "embeddings"),
        ("model.layers.0.mlp.experts.3.up_proj", "fused mixture-of-experts layers"),
    ],
)
def test_layers_that_cannot_be_gated_are_refused(module: str, what: str, workshop: Any, make_raw: Any) -> None:
    odd = make_raw(5, 2)
    odd.factors[module] = tuple(factor.clone() for factor in odd.factors[Q])
    parts = workshop.parts([make_raw(0, 2), odd])
    assert refused(parts, "arrow", {}) == f"'{parts[1].id}' adapts {what}, which cannot be gated; serve it alone."


def test_tensors_that_are_no_factors_are_refused(parts: list[Part]) -> None:
    magnitude = f"base_model.model.{Q}.lora_magnitude_vector"
    save_file({**load_file(parts[0].path / WEIGHTS), magnitude: torch.ones(24)}, parts[0].path / WEIGHTS)
    half = load_file(parts[1].path / WEIGHTS)
    del half[f"base_model.model.{Q}.lora_A.weight"]
    save_file(half, parts[1].path / WEIGHTS)
    message = refused(parts, "arrow", {})
    assert f"'{parts[0].id}' is more than LoRA factors ({magnitude})" in message
    assert f"'{parts[1].id}' has only one of the two factors of {Q}" in message


def test_too_many_rows_come_with_an_offer(parts: list[Part]) -> None:
    message = refused(parts, "arrow", {}, max_rank=8)
    assert "9 rank rows (4 + 3 + 2), over the engine's limit of 8" in message
    assert "the 2 smallest of them would fit" in message
    energy = []
    for part, alpha in zip(parts, (8 / 4, 0, 8 / 2), strict=True):
        tensors = load_file(part.path / WEIGHTS)
        lost = total = 0.0
        for module in (Q, K, V) if alpha else (Q, V):
            A, B = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
            values = torch.linalg.svdvals((alpha or 8 / len(A) ** 0.5) * B @ A).square()
            lost, total = lost + float(values[2:].sum()), total + float(values.sum())
        energy.append(lost / total)
    assert min(energy) == pytest.approx(0, abs=1e-9)
    assert f"compress=2 would keep the 2 strongest directions of each and discard 0.0% to {max(energy):.1%}" in message
    assert plan(parts, "arrow", {}, max_rank=8, compress=2).rank == 6
    assert "12 rank rows (4 + 3 + 2 + 3)" in refused(parts, "phatgoose", {}, max_rank=8)
    assert plan(parts, "phatgoose", {}, max_rank=8, compress=1).rank == 6
    assert "raise the engine's limit" in refused(parts, "arrow", {}, max_rank=2)


def test_missing_vectors_and_statistics_name_the_command_that_makes_them(parts: list[Part]) -> None:
    bare = [Part(f"{name}@1", part.digest, part.path) for name, part in zip("abc", parts, strict=True)]
    assert "'b@1' has no gate vectors for 'meteora'; train them with `moerge gates train b`" in refused(
        bare, "meteora", {}
    )
    message = refused(bare, "evidence", {"score": "smile", "centred": True})
    assert "'c@1' has no 'statistics/unit/smile-16-centred'; measure them with `moerge gates calibrate c`" in message
    assert "'statistics/scaled/spectr'" in refused(bare, "spectr", {"normalise": "zscore"})
    assert plan(bare, "probe", {"normalise": "none"}, max_rank=64)
    half = Part("a@1", parts[0].digest, parts[0].path, {"phatgoose": {Q: torch.zeros(24), K: torch.zeros(23)}})
    message = refused([half, parts[1]], "phatgoose", {})
    assert f"'a@1' lacks gate vectors for 'phatgoose' of {V}" in message
    assert f"of another shape for {K} ((23,) instead of (24,))" in message


def test_settings_are_checked_with_everything_else(parts: list[Part]) -> None:
    message = refused([parts[0], parts[0]], "arrow", {"top_k": 0, "nope": 1}, compress=0)
    assert "setting top_k: Input should be greater" in message
    assert "setting nope: Extra inputs are not permitted" in message
    assert "Its settings: top_k, temperature" in message
    assert "occurs 2 times" in message
    assert "compress is 0" in message
    assert "No gate 'nope'. There are: arrow, spectr" in refused(parts, "nope", {})
    assert "2 weights for 3 members" in refused(parts, "constant", {"weights": [1, 2]})


def test_files_that_are_not_there_are_refused(parts: list[Part], tmp_path: Path) -> None:
    gone = Part("gone@1", "0" * 64, tmp_path / "nowhere")
    broken = Part("broken@1", "1" * 64, shutil.copytree(parts[0].path, tmp_path / "broken"))
    (broken.path / WEIGHTS).write_bytes((broken.path / WEIGHTS).read_bytes()[:100])
    message = refused([parts[0], gone, broken], "arrow", {})
    assert "'gone@1' cannot be read" in message
    assert "'broken@1' cannot be read" in message


def test_tensors_may_come_as_the_registry_gives_them(workshop: Any, parts: list[Part]) -> None:
    arrays = [
        {key: {name: read_only(tensor) for name, tensor in found.items()} for key, found in part.tensors.items()}
        for part in parts
    ]
    same = [Part(part.id, part.digest, part.path, found) for part, found in zip(parts, arrays, strict=True)]
    assert composite_digest(same, "phatgoose", {}) == composite_digest(parts, "phatgoose", {})
    for name, each in (("one", parts), ("two", same)):
        compose(workshop.folder / name, each, "phatgoose", {}, max_rank=64)
    assert bytes_of(workshop.folder / "one") == bytes_of(workshop.folder / "two")


def read_only(tensor: Any) -> Any:
    array = tensor.numpy().copy()
    array.flags.writeable = False
    return array


def test_an_expert_without_factors_is_refused(parts: list[Part]) -> None:
    save_file({}, parts[0].path / WEIGHTS)
    assert f"'{parts[0].id}' adapts nothing" in refused(parts, "arrow", {})


def test_what_is_subtracted_is_no_member(parts: list[Part]) -> None:
    assert "is general knowledge and a member" in refused(parts, "arrow", {}, general=parts[0])


def test_statistics_belong_to_an_expert_and_what_was_done_to_it(parts: list[Part]) -> None:
    layout = plan(parts, "lag", {}, max_rank=64)
    assert statistics_key(gate_of(layout)) == "statistics/scaled/spectr"
    key = statistics_key(gate_of(layout), general=parts[0], compress=3)
    assert key == f"statistics/scaled/spectr-minus-{parts[0].digest[:12]}-rank-3"
    assert statistics_key(gate_of(plan(parts, "constant", {}, max_rank=64))) is None
