"""What a blending operator is: from what each member brings to one module, to one low-rank update of it.

Notation. Member i changes a module by `dW_i = s_i B_i A_i (d_out, d_in)`, has rank r_i and weight w_i. An operator
works module by module and gives either factors, or a dense matrix that is then cut to its best low rank.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from router.lowrank import Factors
from router.taxonomy import Reference

Density = Annotated[float, Field(gt=0, le=1)]
Statistic = Literal["gram", "fisher"]


class BlendSettings(BaseModel):
    """What every operator has.

    rank  the result's largest rank, cut to it by SVD; None: the operator's own, at most the engine's limit
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    rank: int | None = Field(default=None, ge=1)


class Seeded(BlendSettings):
    """seed  of random masks or starts; the same seed and members give the same bytes"""

    seed: int = Field(default=0, ge=0)


@dataclass(frozen=True, eq=False)
class Share:
    """What one member brings to one module.

    id         the member
    weight     of the member in the blend
    B, A       (d_out, r), (r, d_in) as stored; r = 0 for a module that only its statistic speaks of
    scale      alpha / r, or alpha / sqrt(r) for rsLoRA
    seed       for random masks: from the setting, the member's content and the module, so order does not matter
    statistic  the member's Gram matrix or Fisher information of this module, when the operator needs it
    """

    id: str
    weight: float
    B: Tensor
    A: Tensor
    scale: float
    seed: int = 0
    statistic: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def factors(self) -> Factors:
        """dW = B A, the scale in B; float32."""
        return Factors(B=self.B.float() * self.scale, A=self.A.float())

    def dense(self) -> Tensor:
        """dW itself (d_out, d_in), float32."""
        return (self.B.float() @ self.A.float()).mul_(self.scale)


class Operator(ABC):
    """A published way to merge adapters. It has no state, so one instance serves all modules and threads.

    A new operator is one file with a subclass, one line in `router.blending`, one twin in the tests, one docs section.

    formula    what it computes, for the table
    reference  where it was published; None for plain algebra
    exact      gives factors: nothing is lost while the rank is under the limit
    relative   only the ratios of the weights count: a weighted mean. Otherwise they multiply what is added up
    statistic  what every member must carry
    """

    formula: ClassVar[str]
    reference: ClassVar[Reference | None] = None
    exact: ClassVar[bool] = False
    relative: ClassVar[bool] = False
    statistic: ClassVar[Statistic | None] = None
    Settings: ClassVar[type[BlendSettings]] = BlendSettings

    def __init__(self, settings: BlendSettings) -> None:
        self.settings: Any = settings

    @abstractmethod
    def merge(self, module: str, shares: Sequence[Share]) -> Factors | Tensor:
        """The merged update of one module. At least one share."""

    def rows(self, module: str, ranks: Mapping[str, int]) -> int:
        """How many rank rows the merged module gets, from its members' ranks: as many as their sum has.

        An operator that is not exact has one rank for all modules, from the members' largest ranks.
        """
        return sum(ranks.values())

    def weigh(self, weights: Sequence[float]) -> list[float]:
        """The weights that `merge` gets, from those of all members."""
        return list(weights)

    def alone(self, weight: float) -> float:
        """What a single member is multiplied with, where there is nothing to merge."""
        relative = self.relative and getattr(self.settings, "mean", "weights") == "weights"
        return math.copysign(1.0, weight) if relative else weight

    def refuse(self, weights: Mapping[str, float], modules: Sequence[str]) -> Iterator[str]:
        """Reasons of the operator's own against these members."""
        yield from ()
