"""The weighted sum of pruned task vectors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from router.blending.elementwise import Pruned, keep_largest, total
from router.blending.operator import Operator, Share
from router.lowrank import Factors
from router.taxonomy import Reference


class MagnitudePrune(Operator):
    """sum_i w_i top(dW_i), with only the largest elements of each member; TIES without its election."""

    Settings = Pruned

    formula = "sum w (largest elements of dW)"
    reference = Reference(
        title="PEFT's `magnitude_prune`", url="https://huggingface.co/docs/peft/developer_guides/model_merging"
    )

    def merge(self, module: str, shares: Sequence[Share]) -> Factors | Tensor:
        pruned = [keep_largest(share.dense(), self.settings.density) for share in shares]
        return total(pruned, [share.weight for share in shares])
