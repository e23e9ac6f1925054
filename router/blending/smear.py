"""SMEAR: one merged expert with the router's distribution as the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from router.blending.cat import Cat
from router.taxonomy import Reference


class Smear(Cat):
    """sum_i p_i W_i with p_i = w_i / sum w: the average of the experts' whole weight matrices W_i = W_0 + dW_i.

    W_0 cancels, so it is a weighted sum of the dW_i, exact by concatenation. A member that does not adapt a module
    still counts there: with its W_0.
    """

    formula = "sum p dW, p = w / sum w"
    reference = Reference(title="SMEAR (Muqeeth et al. 2023)", url="https://arxiv.org/abs/2306.03745")
    relative = True

    def weigh(self, weights: Sequence[float]) -> list[float]:
        total = sum(weights)
        return [weight / total for weight in weights]

    def refuse(self, weights: Mapping[str, float], modules: Sequence[str]) -> Iterator[str]:
        for name, weight in weights.items():
            if weight < 0:
                yield f"'{name}' has weight {weight}; `smear` takes a distribution, so no weight may be negative."
