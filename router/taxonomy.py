"""How the MoErging survey classifies a routing method (Yadav et al. 2024, arXiv 2408.07057, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The publication that a method follows."""

    title: str
    url: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Taxonomy:
    """The survey's fields; every method declares all of them and the docs table is printed from them.

    expert_training  how the contributed experts must have been trained
    expert_data      whether the experts' training data stays with the contributors
    routing_data     what the router is fitted on: nothing, samples of the experts' or the target task, any
    input            how often it decides: once per task, per prompt (example), or per token (step)
    depth            one decision for the whole model, or one per module
    selection        a few experts (sparse) or all of them (dense)
    aggregation      what is combined: parameters, outputs, or nothing
    generalization   in-distribution tasks only, or out-of-distribution ones as well
    user_data        what the user of the server brings: nothing, a few examples, or a data set
    """

    expert_training: Literal["standard", "custom", "multiple"]
    expert_data: Literal["private", "shared"]
    routing_data: Literal["none", "expert", "target", "general"]
    input: Literal["task", "example", "step"]
    depth: Literal["model", "module"]
    selection: Literal["sparse", "dense"]
    aggregation: Literal["parameter", "output", "none"]
    generalization: Literal["in-distribution", "out-of-distribution"]
    user_data: Literal["zero-shot", "few-shot", "full"]
    reference: Reference | None = None


#: What methods that pick one expert for a prompt by the experts' samples have in common; each says where it differs.
FROM_SAMPLES = Taxonomy(
    expert_training="standard",
    expert_data="private",
    routing_data="expert",
    input="example",
    depth="model",
    selection="sparse",
    aggregation="none",
    generalization="in-distribution",
    user_data="zero-shot",
)
