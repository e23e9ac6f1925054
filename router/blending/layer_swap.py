"""Layer swapping: each layer from one member, with mixed layers in between."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from pydantic import Field, field_validator
from torch import Tensor

from router.blending.cat import concatenate
from router.blending.operator import BlendSettings, Operator, Share
from router.lowrank import Factors
from router.taxonomy import Reference

RANGE = re.compile(r"(\d+)(?:-(\d+))?")


class LayerSwap(Operator):
    """The layers that the settings give to a member are that member's alone, at its full strength: dW = dW_i.

    All others are transition zones: sum_i w_i dW_i.
    """

    class Settings(BlendSettings):
        """layers  member -> its layers: {"language": "0-3, 28-31", "maths": "6-25"}; an id, or the name before its @"""

        layers: dict[str, str] = Field(min_length=1)

        @field_validator("layers")
        @classmethod
        def _ranges(cls, layers: dict[str, str]) -> dict[str, str]:
            given: dict[int, str] = {}
            for member, text in layers.items():
                for layer in numbers(text):
                    if given.setdefault(layer, member) != member:
                        raise ValueError(f"layer {layer} is given to both '{given[layer]}' and '{member}'")
            return layers

    formula = "dW of the layer's member; sum w dW in between"
    reference = Reference(title="Layer swapping (Bandarkar et al. 2024)", url="https://arxiv.org/abs/2410.01335")
    exact = True

    def __init__(self, settings: BlendSettings) -> None:
        super().__init__(settings)
        self._owner = {layer: member for member, text in self.settings.layers.items() for layer in numbers(text)}

    def merge(self, module: str, shares: Sequence[Share]) -> Factors | Tensor:
        owner = self._owner.get(layer_of(module))
        if owner is None:
            return concatenate(shares, [share.weight for share in shares])
        mine = [share for share in shares if is_called(share.id, owner)]
        if not mine:  # the owner does not adapt this module, so nothing does
            return concatenate(shares[:1], [0.0])
        return concatenate(mine, [1.0] * len(mine))

    def rows(self, module: str, ranks: Mapping[str, int]) -> int:
        owner = self._owner.get(layer_of(module))
        mine = [rank for member, rank in ranks.items() if owner is None or is_called(member, owner)]
        return sum(mine) or next(iter(ranks.values()))

    def refuse(self, weights: Mapping[str, float], modules: Sequence[str]) -> Iterator[str]:
        for owner in self.settings.layers:
            if not any(is_called(member, owner) for member in weights):
                yield f"layers are given to '{owner}', which is no member; there are: {', '.join(weights)}."
        there = {layer_of(module) for module in modules}
        if beyond := sorted(self._owner.keys() - there):
            yield f"layer {beyond[0]} is given to '{self._owner[beyond[0]]}', but no member adapts anything there."


def numbers(text: str) -> list[int]:
    """The layers that "0-3, 28" names. Raises ValueError."""
    found: list[int] = []
    for part in text.split(","):
        match = RANGE.fullmatch(part.strip())
        if match is None:
            raise ValueError(f"'{part.strip()}' is no layer or range of layers; write '0-3, 28'")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first or last > 10_000:
            raise ValueError(f"'{part.strip()}' is no range of layers")
        found.extend(range(first, last + 1))
    return found


def layer_of(module: str) -> int:
    """The layer's number in a module's path, -1 when it belongs to none."""
    return next((int(part) for part in module.split(".") if part.isdigit()), -1)


def is_called(member: str, name: str) -> bool:
    return name in (member, member.partition("@")[0])
