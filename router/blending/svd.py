"""The weighted sum, cut to its best low rank."""

from __future__ import annotations

from collections.abc import Mapping

from router.blending.cat import Cat


class SVD(Cat):
    """The best approximation of sum_i w_i dW_i that has the largest member's rank (Eckart and Young 1936).

    From the stacked factors by a QR-reduced SVD, never from a d x d matrix.
    """

    formula = "best rank r of sum w dW"
    exact = False

    def rows(self, module: str, ranks: Mapping[str, int]) -> int:
        return max(ranks.values())
