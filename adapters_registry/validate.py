"""May this adapter be registered? Every reason against it, gathered in one pass.

Nothing here executes or unpickles anything: JSON, and safetensors through its own library.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import PositiveInt, ValidationError
from safetensors import SafetensorError, safe_open

from adapters_registry.base import BaseSpec
from adapters_registry.card import read_card
from adapters_registry.errors import ExpertRefused, Reason
from adapters_registry.expert import Frozen
from adapters_registry.lora import CARD, CONFIG, PICKLES, WEIGHTS, Factors, Layout, LoraConfig
from adapters_registry.proposal import NAME

FLOATS = ("F16", "BF16", "F32", "F64")

# Inits that only choose where training starts. The others (PiSSA, OLoRA, CorDA, LoftQ ...) change the base weights.
HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")

# Fields of PEFT's LoraConfig that change what the adapter means and that vLLM does not implement.
UNSERVABLE = {
    "use_dora": "DoRA",
    "lora_bias": "a LoRA bias",
    "modules_to_save": "fully trained modules (modules_to_save)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "layer_replication": "layer_replication",
    "trainable_token_indices": "trainable_token_indices",
    "target_parameters": "target_parameters",
    "use_bdlora": "block-diagonal LoRA",
    "use_qalora": "QALoRA",
    "megatron_config": "Megatron layers",
    "arrow_config": "Arrow routing inside PEFT",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}


class Limits(Frozen):
    """What the engine and the operator allow. Sizes are in bytes.

    `excluded_modules` are last path components that the engine does not adapt, such as `lm_head`.
    """

    max_rank: PositiveInt = 64
    max_bytes: PositiveInt = 4 * 1024**3
    max_config_bytes: PositiveInt = 1024**2
    max_header_bytes: PositiveInt = 32 * 1024**2
    max_card_bytes: PositiveInt = 1024**2
    excluded_modules: frozenset[str] = frozenset()

    def bytes_for(self, name: str) -> int:
        """How large this file of an adapter may be."""
        return {CONFIG: self.max_config_bytes, WEIGHTS: self.max_bytes, CARD: self.max_card_bytes}[name]


@dataclass(frozen=True)
class AdapterInfo:
    """What an acceptable adapter is: its largest rank, and the last path components it targets."""

    base_model: str | None
    rank: int
    target_modules: tuple[str, ...]
    parameters: int


@dataclass
class Findings:
    """Reasons so far. `many` folds the same complaint about many things into one reason."""

    reasons: list[Reason] = field(default_factory=list)

    def add(self, code: str, message: str) -> None:
        self.reasons.append(Reason(code, message))

    def many(self, code: str, message: str, things: Iterable[str], advice: str = "") -> None:
        if listed := list(things):
            more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
            tail = f" {advice}" if advice else ""
            self.add(code, f"{message}: {', '.join(listed[:3])}{more}.{tail}")


def inspect(
    path: Path, base: BaseSpec, limits: Limits | None = None, *, allow_base_mismatch: bool = False
) -> AdapterInfo:
    """Check the PEFT folder `path`; raises ExpertRefused with all reasons."""
    info, reasons = examine(path, base, limits or Limits(), allow_base_mismatch=allow_base_mismatch)
    if reasons:
        raise ExpertRefused(path.name, reasons)
    assert info is not None, "no reasons, so there is something to describe"
    return info


def examine(
    path: Path,
    base: BaseSpec,
    limits: Limits,
    *,
    allow_base_mismatch: bool = False,
    refused: Collection[str] = (),
) -> tuple[AdapterInfo | None, list[Reason]]:
    """Like `inspect`, but hands the reasons back, for a caller that has more of them to add.

    `refused` are files that the caller has a reason for already, and that are therefore not here.
    """
    found = Findings()
    raw = None if CONFIG in refused else _read_config(path, limits, found)
    config = None
    if raw is not None:
        config = _check_config(raw, limits, found)
        _check_features(raw, found)
        if not allow_base_mismatch:
            _check_base(raw.get("base_model_name_or_path") or read_card(path / CARD).base_model, base, found)
    layout = None if WEIGHTS in refused else _check_weights(path, config, base, limits, found)
    if config is None or layout is None:
        return None, found.reasons
    ranks = [shape[0] for _, shape in layout.A.values()]
    info = AdapterInfo(
        base_model=config.base_model_name_or_path,
        rank=max(ranks, default=config.r),
        target_modules=tuple(sorted({module.rpartition(".")[2] for module in layout.modules})),
        parameters=sum(shape[0] * shape[-1] for side in (layout.A, layout.B) for _, shape in side.values()),
    )
    return info, found.reasons


def name_reasons(name: str, reserved: Iterable[str]) -> list[Reason]:
    """Names become OpenAI model names and folder names: short, lower case, nothing that means something else."""
    if not NAME.fullmatch(name):
        return [
            Reason(
                "invalid_name",
                f"{name[:80]!r} is not a name for an expert or a blend. Use 1 to 64 characters of a-z, 0-9, '.', '_' "
                "and '-', starting with a letter or digit.",
            )
        ]
    if name in {each.casefold() for each in reserved}:
        return [Reason("reserved_name", f"'{name}' is reserved. Choose another name.")]
    return []


def only_pickle(names: Iterable[str]) -> Reason | None:
    """The reason to refuse a folder with these file names and no safetensors, if some of them are pickles."""
    pickles = sorted(name for name in names if name.endswith(PICKLES))
    if not pickles:
        return None
    return Reason(
        "only_pickle",
        f"There is no {WEIGHTS}, only pickled weights, which are never opened: {', '.join(pickles[:3])}. Save the "
        "adapter again with safe_serialization=True.",
    )


def _read_config(path: Path, limits: Limits, found: Findings) -> dict[str, Any] | None:
    file = path / CONFIG
    if not file.is_file():
        found.add("not_lora", f"There is no {CONFIG}; give a folder saved with PEFT's save_pretrained.")
        return None
    size = file.stat().st_size
    if size > limits.max_config_bytes:
        found.add("too_large", f"{CONFIG} has {size:,} bytes; at most {limits.max_config_bytes:,} are read.")
        return None
    try:
        raw = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        found.add("malformed_config", f"{CONFIG} is not JSON: {error}.")
        return None
    if not isinstance(raw, dict):
        found.add("malformed_config", f"{CONFIG} holds a {type(raw).__name__}, not an object.")
        return None
    kind = raw.get("peft_type")
    if kind != "LORA":
        found.add("not_lora", f"The adapter's peft_type is {kind!r}; only 'LORA' can be served.")
        return None
    return raw


def _check_config(raw: dict[str, Any], limits: Limits, found: Findings) -> LoraConfig | None:
    try:
        config = LoraConfig.model_validate(raw)
    except ValidationError as error:
        for each in error.errors():
            where = ".".join(str(part) for part in each["loc"])
            found.add("malformed_config", f"{CONFIG}: {where}: {each['msg']} (got {str(each['input'])[:80]}).")
        return None
    rank = max([config.r, *config.rank_pattern.values()])
    if rank > limits.max_rank:
        found.add("rank_too_high", f"Rank {rank} is over the engine's limit of {limits.max_rank}.")
    return config


def _check_features(raw: dict[str, Any], found: Findings) -> None:
    for key, what in UNSERVABLE.items():
        if raw.get(key):
            found.add("unsupported_feature", f"It uses {what}, which vLLM cannot serve.")
    if (bias := raw.get("bias", "none")) != "none":
        found.add("unsupported_feature", f"It trains biases (bias={bias!r}), which vLLM cannot serve.")
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in HARMLESS_INITS:
        found.add(
            "unsupported_feature",
            f"init_lora_weights={init!r} changed the base weights in training, so the adapter is wrong on the plain "
            "base model. Convert it with PEFT's path_initial_model_for_weight_conversion.",
        )


def _check_base(declared: object, base: BaseSpec, found: Findings) -> None:
    """A Hub id must be one of the base's names; for anything else (a folder, nothing) the shapes decide."""
    if not isinstance(declared, str) or not declared or declared.casefold() in base.accepted:
        return
    if declared.count("/") != 1 or declared.startswith(("/", ".", "~")) or "\\" in declared:
        return
    # A base served from a folder has no Hub id of its own: the same last component will do.
    if declared.rpartition("/")[2].casefold() in {_last(name) for name in base.accepted if _is_path(name)}:
        return
    found.add(
        "other_base_model",
        f"It was trained for base model '{declared}', and this server runs '{base.name}'. If they are the same "
        "weights, list it among the base model's aliases or register with allow_base_mismatch.",
    )


def _is_path(name: str) -> bool:
    return name.startswith(("/", ".", "~"))


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _check_weights(
    path: Path, config: LoraConfig | None, base: BaseSpec, limits: Limits, found: Findings
) -> Layout | None:
    file = path / WEIGHTS
    if not file.is_file():
        reason = only_pickle(each.name for each in path.iterdir())
        found.reasons.append(reason or Reason("missing_weights", f"There is no {WEIGHTS}."))
        return None
    size = file.stat().st_size
    if size > limits.max_bytes:
        found.add("too_large", f"{WEIGHTS} has {size:,} bytes; at most {limits.max_bytes:,} are accepted.")
        return None
    if problem := _header_problem(file, size, limits):
        found.add("malformed_weights", problem)
        return None
    try:
        with safe_open(file, framework="pt") as tensors:
            layout = _check_layout(tensors, config, base, limits, found)
            if not any(reason.code == "malformed_weights" for reason in found.reasons):
                _check_values(tensors, layout, found)
    except (SafetensorError, OSError, ValueError) as error:
        found.add("malformed_weights", f"{WEIGHTS} is not a safetensors file: {error}.")
        return None
    return layout


def _header_problem(file: Path, size: int, limits: Limits) -> str | None:
    """The declared header length, before any parser is asked to allocate it."""
    if size < 8:
        return f"{WEIGHTS} has {size} bytes, which is too short for safetensors."
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
    if length > size - 8:
        return f"{WEIGHTS} declares a header of {length:,} bytes in a file of {size:,}: truncated or not safetensors."
    if length > limits.max_header_bytes:
        return f"{WEIGHTS} declares a header of {length:,} bytes; at most {limits.max_header_bytes:,} are read."
    return None


def _check_layout(tensors: Any, config: LoraConfig | None, base: BaseSpec, limits: Limits, found: Findings) -> Layout:
    layout = Layout()
    wrong_types: list[str] = []
    for name in tensors.keys():  # noqa: SIM118 (not a mapping)
        view = tensors.get_slice(name)
        layout.add(name, tuple(view.get_shape()))
        if view.get_dtype() not in FLOATS:
            wrong_types.append(f"{name} ({view.get_dtype()})")
    found.many("malformed_weights", f"Tensors must be one of {', '.join(FLOATS)}", wrong_types)
    found.many("unexpected_tensor", "It holds tensors that are not LoRA factors of a module", layout.unexpected)
    found.many("unsupported_feature", "It adapts embeddings, which is not supported", layout.embeddings)
    if not layout.modules:
        found.add("not_lora", f"{WEIGHTS} holds no LoRA factors (…lora_A.weight and …lora_B.weight).")
    found.many("incomplete_pair", "A without its B, or B without its A", sorted(layout.A.keys() ^ layout.B.keys()))
    unknown = [module for module in layout.modules if module not in base.modules]
    found.many("unknown_module", f"Base model '{base.name}' has no such modules", unknown)
    excluded = [module for module in layout.modules if module.rpartition(".")[2] in limits.excluded_modules]
    found.many("unsupported_module", "The engine does not adapt", excluded)
    _check_shapes(layout, config, base, limits, found)
    return layout


def _check_shapes(layout: Layout, config: LoraConfig | None, base: BaseSpec, limits: Limits, found: Findings) -> None:
    wrong: list[str] = []
    ranks: list[str] = []
    too_high: list[str] = []
    for module in sorted(layout.A.keys() & layout.B.keys()):
        a, b = layout.A[module][1], layout.B[module][1]
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] == 0:
            wrong.append(f"{module} (A {_by(a)}, B {_by(b)})")
            continue
        if (shape := base.modules.get(module)) is not None and (b[0], a[1]) != shape:
            wrong.append(f"{module} (B A is {b[0]} x {a[1]}, the module {shape[0]} x {shape[1]})")
        if config is not None and a[0] != config.rank(module):
            ranks.append(f"{module} (rank {a[0]}, configured {config.rank(module)})")
        if a[0] > limits.max_rank:
            too_high.append(f"{module} (rank {a[0]})")
    for module, (_, copied) in layout.copies.items():
        if copied != base.modules.get(module, copied):
            wrong.append(f"{module} (its copy of the base weights is {_by(copied)}: a resized vocabulary)")
    found.many("wrong_shape", f"Shapes do not fit base model '{base.name}'", wrong)
    found.many("rank_mismatch", f"Ranks differ from {CONFIG}", ranks)
    if not any(reason.code == "rank_too_high" for reason in found.reasons):
        found.many("rank_too_high", f"Ranks over the engine's limit of {limits.max_rank}", too_high)


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape) or "scalar"


def _check_values(tensors: Any, layout: Layout, found: Findings) -> None:
    """One tensor in memory at a time. `B A` is zero where either factor is."""
    broken: list[str] = []

    def nonzero(factors: Factors) -> set[str]:
        modules = set()
        for module, (name, _) in factors.items():
            tensor = tensors.get_tensor(name)
            if not bool(tensor.isfinite().all()):
                broken.append(name)
            if bool(tensor.any()):
                modules.add(module)
        return modules

    if layout.A and layout.B and not nonzero(layout.A) & nonzero(layout.B):
        found.add(
            "no_effect",
            "Every B A is zero: the adapter changes nothing. Was it trained, and saved afterwards?",
        )
    found.many("not_finite", "NaN or infinity in", broken)
