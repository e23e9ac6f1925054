"""A PEFT LoRA folder as data: its configuration, and the names and shapes of its tensors."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"
KEPT = (CONFIG, WEIGHTS, CARD)
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

Rank = Annotated[int, Field(gt=0)]

_TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


class LoraConfig(BaseModel):
    """The part of `adapter_config.json` that decides how the weights are applied."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    r: Rank
    lora_alpha: Annotated[float, Field(allow_inf_nan=False)]
    use_rslora: bool = False
    rank_pattern: dict[str, Rank] = {}
    alpha_pattern: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = {}
    base_model_name_or_path: str | None = None

    @field_validator("rank_pattern", "alpha_pattern", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _harmless(cls, patterns: dict[str, Any]) -> dict[str, Any]:
        """The keys are regular expressions that PEFT and vLLM run: none may take exponential time."""
        for pattern in patterns:
            repeats = len(re.findall(r"[*+{]", pattern))
            if len(pattern) > 256 or repeats > 2 or re.search(r"\)[*+{]|\\\d", pattern):
                raise ValueError(f"pattern '{pattern[:60]}' is too complicated; name modules or their endings")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"pattern '{pattern}' is not a regular expression: {error}") from error
        return patterns

    def rank(self, module: str) -> int:
        """The rank of one module, by PEFT's rule: the first pattern that matches the end of its path."""
        return int(_match(self.rank_pattern, module, self.r))

    def scaling(self, module: str) -> float:
        """What `B A` is multiplied with: alpha / r, or alpha / sqrt(r) for rsLoRA."""
        alpha = float(_match(self.alpha_pattern, module, self.lora_alpha))
        rank = self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def _match(patterns: dict[str, Any], module: str, default: float) -> float:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return default


# Beside an adapted output layer PEFT saves a copy of the base model's own, which engines skip.
_COPY = re.compile(r"(?:base_model\.model\.)?(?P<module>(.+\.)?lm_head)\.base_layer\.weight")

Factors = dict[str, tuple[str, tuple[int, ...]]]  # {module: (tensor name, shape)}


@dataclass
class Layout:
    """The tensors of an adapter file, sorted by what they are."""

    A: Factors = field(default_factory=dict)
    B: Factors = field(default_factory=dict)
    copies: Factors = field(default_factory=dict)
    embeddings: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def add(self, tensor: str, shape: tuple[int, ...]) -> None:
        if match := _TENSOR.fullmatch(tensor):
            side = self.A if match["side"] == "A" else self.B
            side[match["module"]] = (tensor, shape)
        elif match := _COPY.fullmatch(tensor):
            self.copies[match["module"]] = (tensor, shape)
        elif tensor.endswith(("lora_embedding_A", "lora_embedding_B")):
            self.embeddings.append(tensor)
        else:
            self.unexpected.append(tensor)

    @property
    def modules(self) -> list[str]:
        return sorted(self.A.keys() | self.B.keys())
