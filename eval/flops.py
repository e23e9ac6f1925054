"""What a token costs: floating point operations of the model and of the adapters that are on, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

from adapters_registry.validate import FLOATS
from eval.recipe import Recipe
from router.adapter import Adapter
from router.blending import OPERATORS
from router.blending.plan import make_plan
from router.composite import Part
from router.gating import GATES


class Flops:
    """2 (N + n) for a token: N parameters of the base model, n of the LoRA matrices that are on beside it.

    `base` is a folder or a Hub id, `experts` are folders by name, `max_rank` is what the engine cuts blends to. No
    weights are read. What cannot be known is None.
    """

    def __init__(
        self, base: str | Path, experts: Mapping[str, Path], *, revision: str | None = None, max_rank: int = 64
    ) -> None:
        self._base, self._revision, self._max_rank = str(base), revision, max_rank
        self._experts = experts
        self._known: dict[str, int | None] = {}

    @cached_property
    def base(self) -> int | None:
        """N, tied weights once."""
        return base_parameters(self._base, self._revision)

    def of(self, recipe: Recipe) -> float | None:
        beside = self.adapters(recipe)
        return None if self.base is None or beside is None else 2.0 * (self.base + beside)

    def adapters(self, recipe: Recipe) -> int | None:
        """n. Of a gate all members, whatever their weights; None for a probe, as its prompt says who answers."""
        unweighed = tuple((name, 1.0) for name in recipe.names)  # shapes do not depend on weights
        key = recipe.model_copy(update={"experts": unweighed}).model_dump_json()
        if key not in self._known:
            try:
                self._known[key] = self._adapters(recipe)
            except (KeyError, OSError, ValueError, SafetensorError):  # no folder, or not an adapter's
                self._known[key] = None
        return self._known[key]

    def _adapters(self, recipe: Recipe) -> int | None:
        match recipe.kind:
            case "base":
                return 0
            case "select":
                return lora_parameters(self._experts[recipe.names[0]])
            case "blend":
                return self._blend(recipe)
            case "gate" if recipe.gate != "probe":
                return self._gate(recipe)
            case _:
                return None

    def _blend(self, recipe: Recipe) -> int:
        """Every module has the rank of the largest, as a blend is written."""
        parts = [Part(name, name, self._experts[name]) for name in recipe.names]
        weights = [weight for _, weight in recipe.experts]
        operator, settings = recipe.operator or "cat", recipe.settings
        if operator in OPERATORS and OPERATORS[operator].statistic:  # the engine has it; one without has the same shape
            operator, settings = "cat" if OPERATORS[operator].exact else "ties", {"rank": settings.get("rank")}
        plan = make_plan(parts, weights, operator, settings, self._max_rank)
        return max(map(plan.rows, plan.modules)) * sum(map(sum, plan.modules.values()))

    def _gate(self, recipe: Recipe) -> int:
        assert recipe.gate is not None
        general = Adapter(self._experts[recipe.general]) if recipe.general else None
        total = 0
        for adapter in (Adapter(self._experts[name]) for name in recipe.names):
            for module in adapter.modules:
                rows = adapter.rank(module) + (general.rank(module) if general else 0)
                total += (min(rows, recipe.compress or rows) + GATES[recipe.gate].extra) * sum(adapter.shape(module))
        return total


@lru_cache(maxsize=1024)
def lora_parameters(folder: Path) -> int:
    """r (d_in + d_out), over the modules. Raises OSError, ValueError or SafetensorError for what is no adapter."""
    adapter = Adapter(folder)
    return sum(adapter.rank(module) * sum(adapter.shape(module)) for module in adapter.modules)


@lru_cache(maxsize=8)
def base_parameters(model: str, revision: str | None = None) -> int | None:
    """Of a folder's or a Hub repository's model; None where there is no configuration that can be read."""
    return _stored_parameters(Path(model)) or _configured_parameters(model, revision)


def _stored_parameters(folder: Path) -> int | None:
    """By the names and shapes of a folder's weights; None where it has none, or packed ones."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                view = tensors.get_slice(name)
                if view.get_dtype() not in FLOATS:
                    return None
                total += math.prod(view.get_shape())
    return total or None


def _configured_parameters(model: str, revision: str | None) -> int | None:
    """By the configuration alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(model, revision=revision)
        with torch.device("meta"):
            return int(AutoModelForCausalLM.from_config(config).num_parameters())
    except (OSError, ValueError, KeyError):
        return None
