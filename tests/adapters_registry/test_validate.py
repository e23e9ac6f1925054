"""Every reason to refuse an adapter, alone and together."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from adapters_registry.base import BaseSpec
from adapters_registry.errors import ExpertRefused
from adapters_registry.validate import Limits, inspect

MakeAdapter = Callable[..., Path]
Tensors = dict[str, torch.Tensor]

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
A = f"{LAYER}.lora_A.weight"
B = f"{LAYER}.lora_B.weight"


def configure(adapter: Path, **fields: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def change(adapter: Path, edit: Callable[[Tensors], object]) -> None:
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def refusal(adapter: Path, base: BaseSpec, limits: Limits | None = None) -> ExpertRefused:
    with pytest.raises(ExpertRefused) as refused:
        inspect(adapter, base, limits)
    return refused.value


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"r": 1},
        {"use_rslora": True, "lora_alpha": 7},
        {"target_modules": "all-linear", "r": 16},
        {"rank_pattern": {"q_proj": 8, r"layers\.1\.self_attn\.v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"target_modules": ["lm_head"]},
        {"layers_to_transform": [1]},
        {"init_lora_weights": False, "lora_dropout": 0.1},
    ],
)
def test_what_peft_saves_is_accepted(
    make_adapter: MakeAdapter, base: BaseSpec, tmp_path: Path, options: dict[str, Any]
) -> None:
    info = inspect(make_adapter(tmp_path / "adapter", **options), base)
    assert info.rank == max([options.get("r", 4), *options.get("rank_pattern", {}).values()])
    assert info.parameters > 0


def test_target_modules_are_those_in_the_file(make_adapter: MakeAdapter, base: BaseSpec, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", target_modules=["down_proj", "k_proj"])
    assert inspect(folder, base).target_modules == ("down_proj", "k_proj")


def test_half_precision_is_accepted(adapter: Path, base: BaseSpec) -> None:
    change(adapter, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    assert inspect(adapter, base).rank == 4


@pytest.mark.parametrize(
    ("fields", "code", "says"),
    [
        ({"peft_type": "IA3"}, "not_lora", "IA3"),
        ({"peft_type": None}, "not_lora", "None"),
        ({"rank_pattern": {"o_proj": 65}}, "rank_too_high", "65 is over the engine's limit of 64"),
        ({"r": 0}, "malformed_config", "r: Input should be greater than 0"),
        ({"r": "8"}, "malformed_config", "r: Input should be a valid integer"),
        ({"r": True}, "malformed_config", "r:"),
        ({"lora_alpha": float("inf")}, "malformed_config", "lora_alpha"),
        ({"lora_alpha": None}, "malformed_config", "lora_alpha"),
        ({"rank_pattern": {"q_proj": -1}}, "malformed_config", "rank_pattern.q_proj"),
        ({"rank_pattern": {"(": 4}}, "malformed_config", "not a regular expression"),
        ({"alpha_pattern": {"(a+)+": 4}}, "malformed_config", "too complicated"),
        ({"r": 8}, "rank_mismatch", "rank 4, configured 8"),
        ({"rank_pattern": {"v_proj": 2}}, "rank_mismatch", "v_proj (rank 4, configured 2)"),
        ({"use_dora": True}, "unsupported_feature", "DoRA"),
        ({"bias": "all"}, "unsupported_feature", "bias='all'"),
        ({"lora_bias": True}, "unsupported_feature", "LoRA bias"),
        ({"modules_to_save": ["lm_head"]}, "unsupported_feature", "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "unsupported_feature", "pissa"),
        ({"init_lora_weights": "pissa_niter_16"}, "unsupported_feature", "pissa_niter_16"),
        ({"init_lora_weights": "olora"}, "unsupported_feature", "olora"),
        ({"init_lora_weights": "corda"}, "unsupported_feature", "corda"),
        ({"init_lora_weights": "loftq"}, "unsupported_feature", "loftq"),
        ({"alora_invocation_tokens": [1, 2]}, "unsupported_feature", "alora"),
        ({"layer_replication": [[0, 2]]}, "unsupported_feature", "layer_replication"),
        ({"trainable_token_indices": [1]}, "unsupported_feature", "trainable_token_indices"),
        ({"target_parameters": ["experts.w1"]}, "unsupported_feature", "target_parameters"),
        ({"use_qalora": True}, "unsupported_feature", "QALoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "unsupported_feature", "block-diagonal"),
        ({"megatron_config": {"a": 1}}, "unsupported_feature", "Megatron"),
        ({"arrow_config": {"top_k": 2}}, "unsupported_feature", "Arrow"),
        ({"kasa_config": {"beta": 1}}, "unsupported_feature", "KaSA"),
        ({"monteclora_config": {"a": 1}}, "unsupported_feature", "MonteCLoRA"),
        (
            {"base_model_name_or_path": "someone/other"},
            "other_base_model",
            "'someone/other', and this server runs 'tiny'",
        ),
    ],
)
def test_configurations_that_cannot_be_served(
    adapter: Path, base: BaseSpec, fields: dict[str, Any], code: str, says: str
) -> None:
    configure(adapter, **fields)
    refused = refusal(adapter, base)
    assert refused.codes == {code}
    assert says in str(refused)


@pytest.mark.parametrize("init", ["gaussian", "eva", "orthogonal", True, False])
def test_inits_that_leave_the_base_alone_are_accepted(adapter: Path, base: BaseSpec, init: object) -> None:
    configure(adapter, init_lora_weights=init)
    inspect(adapter, base)


@pytest.mark.parametrize(
    "declared",
    [None, "", "tiny", "TINY", "org/tiny-llama", "/somewhere/else", "./models/x", "a/b/c", "tiny-llama-copy"],
)
def test_its_own_names_and_folders_are_the_base_model(adapter: Path, base: BaseSpec, declared: str | None) -> None:
    configure(adapter, base_model_name_or_path=declared)
    inspect(adapter, base)


def test_a_base_served_from_a_folder_is_known_by_the_folders_name(adapter: Path, base_folder: Path) -> None:
    local = BaseSpec.from_pretrained(base_folder, name="served")
    configure(adapter, base_model_name_or_path="meta/Tiny-Llama")
    inspect(adapter, local)
    configure(adapter, base_model_name_or_path="meta/other-llama")
    assert refusal(adapter, local).codes == {"other_base_model"}


def test_the_caller_may_vouch_for_another_base_model_but_shapes_still_decide(adapter: Path, base: BaseSpec) -> None:
    configure(adapter, base_model_name_or_path="someone/other")
    inspect(adapter, base, allow_base_mismatch=True)


def test_the_card_names_the_base_model_when_the_configuration_does_not(adapter: Path, base: BaseSpec) -> None:
    configure(adapter, base_model_name_or_path=None)
    (adapter / "README.md").write_text("---\nbase_model: someone/other\n---\n")
    assert refusal(adapter, base).codes == {"other_base_model"}


@pytest.mark.parametrize(
    ("edit", "code", "says"),
    [
        (lambda t: t.pop(B), "incomplete_pair", "layers.0.self_attn.q_proj"),
        (lambda t: t.pop(A), "incomplete_pair", "layers.0.self_attn.q_proj"),
        (lambda t: t.update({B: torch.zeros(31, 4)}), "wrong_shape", "31 x 32, the module 32 x 32"),
        (lambda t: t.update({A: torch.zeros(4, 33)}), "wrong_shape", "32 x 33"),
        (lambda t: t.update({A: torch.zeros(5, 32)}), "wrong_shape", "A 5 x 32, B 32 x 4"),
        (lambda t: t.update({A: torch.zeros(4)}), "wrong_shape", "A 4,"),
        (lambda t: t.update({A: torch.zeros(0, 32), B: torch.zeros(32, 0)}), "wrong_shape", "A 0 x 32"),
        (lambda t: t.update({A: torch.full((4, 32), torch.nan)}), "not_finite", "q_proj.lora_A"),
        (lambda t: t[B].view(-1)[0].fill_(torch.inf), "not_finite", "q_proj.lora_B"),
        (lambda t: [t[name].zero_() for name in t if "lora_B" in name], "no_effect", "changes nothing"),
        (lambda t: [t[name].zero_() for name in t if "lora_A" in name], "no_effect", "changes nothing"),
        (
            lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(1)}),
            "unexpected_tensor",
            "lm_head",
        ),
        (
            lambda t: t.update({f"{LAYER}.lora_magnitude_vector": torch.ones(32)}),
            "unexpected_tensor",
            "magnitude",
        ),
        (lambda t: t.update({f"{LAYER}.lora_B.bias": torch.ones(32)}), "unexpected_tensor", "bias"),
        (
            lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 64)}),
            "unsupported_feature",
            "embeddings",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.base_layer.weight": torch.ones(65, 32)}),
            "wrong_shape",
            "a resized vocabulary",
        ),
        (lambda t: t.update({A: torch.ones(4, 32, dtype=torch.int32)}), "malformed_weights", "I32"),
        (lambda t: (t.clear(), t.update({"x": torch.ones(1)})), "not_lora", "no LoRA factors"),
    ],
)
def test_weights_that_cannot_be_served(
    adapter: Path, base: BaseSpec, edit: Callable[[Tensors], object], code: str, says: str
) -> None:
    change(adapter, edit)
    refused = refusal(adapter, base)
    assert code in refused.codes
    assert says in str(refused)


@pytest.mark.parametrize(
    "module", ["model.layers.2.self_attn.q_proj", "model.layers.0.mlp.q_proj", "transformer.h.0.attn.c_attn"]
)
def test_modules_that_the_base_does_not_have(adapter: Path, base: BaseSpec, module: str) -> None:
    def move(tensors: Tensors) -> None:
        for side in "AB":
            name = f"base_model.model.{module}.lora_{side}.weight"
            tensors[name] = tensors.pop(f"{LAYER}.lora_{side}.weight")

    change(adapter, move)
    refused = refusal(adapter, base)
    assert refused.codes == {"unknown_module"}
    assert module in str(refused)


def test_an_adapter_of_a_larger_model_is_refused_in_a_few_lines(
    make_adapter: MakeAdapter, base: BaseSpec, tmp_path: Path
) -> None:
    larger = LlamaConfig(**{**base_config(), "hidden_size": 64, "num_hidden_layers": 9})
    refused = refusal(make_adapter(tmp_path / "adapter", llama=larger), base)
    assert refused.codes == {"wrong_shape", "unknown_module"}
    assert "and 11 more" in str(refused), "14 modules of layers that do not exist, three of them named"


def base_config() -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    }


def test_one_trained_module_is_an_effect(adapter: Path, base: BaseSpec) -> None:
    change(adapter, lambda tensors: [tensors[name].zero_() for name in tensors if "lora_B" in name and name != B])
    inspect(adapter, base)


def test_modules_that_the_engine_does_not_adapt(make_adapter: MakeAdapter, base: BaseSpec, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", target_modules=["lm_head", "q_proj"])
    refused = refusal(folder, base, Limits(excluded_modules=frozenset({"lm_head"})))
    assert refused.codes == {"unsupported_module"}


def test_tensors_over_the_rank_limit_are_refused_whatever_the_configuration_says(adapter: Path, base: BaseSpec) -> None:
    configure(adapter, r=2)
    assert refusal(adapter, base, Limits(max_rank=2)).codes == {"rank_mismatch", "rank_too_high"}


def header(length: int, body: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + body


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        header(2**63),
        header(10**9, b"{}"),
        header(0),
        header(2, b"{}") + b"trailing bytes",
        header(4, b"\xff\xff\xff\xff"),
        header(2, b"[]"),
        header(18, b'{"a":{"dtype":"X"}'),
        header(61, b'{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,999999]}}'),
        b"PK\x03\x04" + b"\0" * 64,
        b"\x80\x02}q\x00." + b"\0" * 16,
    ],
)
def test_files_that_are_not_safetensors(adapter: Path, base: BaseSpec, content: bytes) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(content)
    assert refusal(adapter, base).codes <= {"malformed_weights", "not_lora"}


def test_a_truncated_file_is_refused(adapter: Path, base: BaseSpec) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert refusal(adapter, base).codes == {"malformed_weights"}


def test_an_oversized_header_is_refused_before_it_is_parsed(adapter: Path, base: BaseSpec) -> None:
    length = 4096
    (adapter / "adapter_model.safetensors").write_bytes(header(length, b" " * length))
    refused = refusal(adapter, base, Limits(max_header_bytes=1024))
    assert refused.codes == {"malformed_weights"}
    assert "4,096 bytes; at most 1,024" in str(refused)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"1", b'"LORA"', b"[" * 100_000])
def test_configurations_that_are_not_json_objects(adapter: Path, base: BaseSpec, content: bytes) -> None:
    (adapter / "adapter_config.json").write_bytes(content)
    assert refusal(adapter, base).codes == {"malformed_config"}


def test_large_files_are_not_read(adapter: Path, base: BaseSpec) -> None:
    refused = refusal(adapter, base, Limits(max_bytes=100, max_config_bytes=100))
    assert refused.codes == {"too_large"}
    assert len(refused.reasons) == 2


def test_a_pickle_alone_is_refused_and_never_opened(
    adapter: Path, base: BaseSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'echo'\ntR.")
    opened: list[str] = []
    true_open = Path.open

    def noted(self: Path, *args: Any, **how: Any) -> Any:
        opened.append(self.name)
        return true_open(self, *args, **how)

    monkeypatch.setattr(Path, "open", noted)
    assert refusal(adapter, base).codes == {"only_pickle"}
    assert "adapter_model.bin" not in opened


def test_a_pickle_beside_safetensors_does_not_matter(adapter: Path, base: BaseSpec) -> None:
    (adapter / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'echo'\ntR.")
    inspect(adapter, base)


def test_an_empty_folder_says_what_is_missing(tmp_path: Path, base: BaseSpec) -> None:
    assert refusal(tmp_path, base).codes == {"not_lora", "missing_weights"}


def test_everything_that_is_wrong_is_said_at_once(adapter: Path, base: BaseSpec) -> None:
    configure(adapter, r=128, use_dora=True, bias="all", base_model_name_or_path="someone/other")

    def spoil(tensors: Tensors) -> None:
        tensors.pop(B)
        tensors["x"] = torch.ones(1)
        tensors["base_model.model.model.layers.9.self_attn.v_proj.lora_A.weight"] = torch.full((4, 32), torch.nan)
        tensors["base_model.model.model.layers.9.self_attn.v_proj.lora_B.weight"] = torch.ones(16, 4)
        tensors["base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"] = torch.ones(17, 4)

    change(adapter, spoil)
    refused = refusal(adapter, base)
    assert [reason.code for reason in refused.reasons] == [
        "rank_too_high",
        "unsupported_feature",
        "unsupported_feature",
        "other_base_model",
        "unexpected_tensor",
        "incomplete_pair",
        "unknown_module",
        "wrong_shape",
        "rank_mismatch",
        "not_finite",
    ]
