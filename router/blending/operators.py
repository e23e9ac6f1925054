"""The operators, under the names that requests and configuration use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from router.blending.breadcrumbs import Breadcrumbs
from router.blending.cat import Cat
from router.blending.consensus import Consensus
from router.blending.dare_linear import DareLinear
from router.blending.dare_ties import DareTies
from router.blending.della import Della
from router.blending.errors import BlendError
from router.blending.fisher import Fisher
from router.blending.knots import KnOTS
from router.blending.layer_swap import LayerSwap
from router.blending.lego import Lego
from router.blending.linear import Linear
from router.blending.lorahub import LORAHUB
from router.blending.magnitude_prune import MagnitudePrune
from router.blending.operator import Operator
from router.blending.pcb import PCB
from router.blending.regmean import RegMean
from router.blending.sce import SCE
from router.blending.smear import Smear
from router.blending.soup import SOUP
from router.blending.svd import SVD
from router.blending.task_arithmetic import TaskArithmetic
from router.blending.ties import Ties
from router.taxonomy import Reference

OPERATORS: dict[str, type[Operator]] = {
    "cat": Cat,
    "linear": Linear,
    "svd": SVD,
    "task_arithmetic": TaskArithmetic,
    "smear": Smear,
    "layer_swap": LayerSwap,
    "ties": Ties,
    "dare_linear": DareLinear,
    "dare_ties": DareTies,
    "magnitude_prune": MagnitudePrune,
    "della": Della,
    "breadcrumbs": Breadcrumbs,
    "sce": SCE,
    "pcb": PCB,
    "consensus": Consensus,
    "knots": KnOTS,
    "lego": Lego,
    "fisher": Fisher,
    "regmean": RegMean,
}


#: Methods that look for the weights of a blend.
SEARCHES = {"soup": SOUP, "lorahub": LORAHUB}


def operator_of(name: str, settings: Mapping[str, Any]) -> Operator:
    """Raises BlendError for a name it does not know, and for settings that the operator has not or cannot take."""
    if name not in OPERATORS:
        raise BlendError([f"No operator '{name}'. There are: {', '.join(OPERATORS)}."])
    operator = OPERATORS[name]
    try:
        return operator(operator.Settings.model_validate(dict(settings)))
    except ValidationError as error:
        known = ", ".join(operator.Settings.model_fields)
        raise BlendError(
            f"Operator '{name}', setting {'.'.join(str(part) for part in each['loc'])}: {each['msg']} "
            f"(got {str(each['input'])[:80]}). Its settings: {known}."
            for each in error.errors()
        ) from error


def operators_table() -> str:
    """What every operator and search declares about itself, as a Markdown table: one row to each."""
    rows = [["operator", "computes", "weights", "result", "density", "seed", "needs", "reference"], ["---"] * 8]
    for name, operator in OPERATORS.items():
        fields, reference = operator.Settings.model_fields, operator.reference
        density = next((field for field in ("density", "select") if field in fields), None)
        rows.append(
            [
                f"`{name}`",
                operator.formula,
                "relative" if operator.relative else "absolute",
                "exact" if operator.exact else "truncated",
                f"`{density}` {fields[density].default}" if density else "",
                "yes" if "seed" in fields else "",
                operator.statistic or "",
                _link(reference) if reference else "",
            ]
        )
    for name, search in SEARCHES.items():
        seed = "yes" if search.seeded else ""
        rows.append([f"`{name}`", search.formula, "found", "", "", seed, "labelled set", _link(search.reference)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _link(reference: Reference) -> str:
    return f"[{reference.title}]({reference.url})"
