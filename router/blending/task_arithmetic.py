"""Task arithmetic: a scaled sum of task vectors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from router.blending.cat import concatenate
from router.blending.operator import BlendSettings, Operator, Share
from router.lowrank import Factors
from router.taxonomy import Reference


class TaskArithmetic(Operator):
    """lambda sum_i w_i dW_i: the task vector of a member is its dW. A negative weight takes a skill away."""

    class Settings(BlendSettings):
        """scale  lambda, one factor for all members; the paper's best is about 0.3 with weights of 1"""

        scale: float = 1.0

    formula = "λ sum w dW"
    reference = Reference(title="Task arithmetic (Ilharco et al. 2023)", url="https://arxiv.org/abs/2212.04089")
    exact = True

    def merge(self, module: str, shares: Sequence[Share]) -> Factors | Tensor:
        return concatenate(shares, [self.settings.scale * share.weight for share in shares])
