"""DARE followed by TIES's election of signs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from router.blending.dare_linear import DARE
from router.blending.elementwise import Dropped, Electing, drop_and_rescale, elect
from router.blending.operator import Operator, Share
from router.lowrank import Factors


class DareTies(Operator):
    """Drop elements of dW_i at random and rescale, elect a sign for every element, average the members that have it."""

    class Settings(Dropped, Electing):
        pass

    formula = "mean of (mask * dW) / p that agree with the elected sign"
    reference = DARE
    relative = True

    def merge(self, module: str, shares: Sequence[Share]) -> Factors | Tensor:
        dropped = [drop_and_rescale(share.dense(), self.settings.density, share.seed) for share in shares]
        return elect(dropped, [share.weight for share in shares], self.settings.mean)
