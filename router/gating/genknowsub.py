"""GenKnowSub: take general knowledge out of the experts before any gate looks at them."""

from __future__ import annotations

from router.lowrank import Factors, stack
from router.taxonomy import Reference, Taxonomy

EQUATION = "any gate on `dW_k - dW_g`"
TAXONOMY = Taxonomy(
    expert_training="standard",
    expert_data="private",
    routing_data="general",
    input="step",
    depth="module",
    selection="sparse",
    aggregation="output",
    generalization="out-of-distribution",
    user_data="zero-shot",
    reference=Reference(title="GenKnowSub (Bagherifard et al. 2025)", url="https://arxiv.org/abs/2505.10939"),
)


def subtract(expert: Factors | None, general: Factors | None) -> Factors | None:
    """dW_k - dW_g = [B_k, -B_g] [A_k; A_g], of rank r_k + r_g.

    Exact, unlike (B_k - B_g) (A_k - A_g), which has cross terms. None stands for a module without adapter: zero.
    """
    if general is None:
        return expert
    negative = Factors(B=-general.B, A=general.A)
    return negative if expert is None else stack([expert, negative])
