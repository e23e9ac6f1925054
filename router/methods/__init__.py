"""The routing methods, under the names that `auto:<method>` uses."""

from __future__ import annotations

from dataclasses import fields

from router.method import Method
from router.methods.bandit import Bandit
from router.methods.base import Base
from router.methods.centroids import Centroids
from router.methods.classifier import Classifier
from router.methods.fusion import Fusion
from router.methods.gated import NAMES, TRAINED, gated
from router.methods.knn import KNN
from router.methods.lda import LDA
from router.methods.lexical import Lexical
from router.methods.random import Random
from router.methods.retrieval import Retrieval
from router.taxonomy import Reference, Taxonomy

METHODS: dict[str, type[Method]] = {
    "retrieval": Retrieval,
    "centroids": Centroids,
    "knn": KNN,
    "lda": LDA,
    "lexical": Lexical,
    "classifier": Classifier,
    "fusion": Fusion,
    "bandit": Bandit,
    "random": Random,
    "base": Base,
    **{name: gated(name) for name in NAMES},
}

#: What a server offers unless it is told otherwise: everything that needs nothing but registered experts.
SERVED = ("fusion", "retrieval", *(name for name in NAMES if name not in TRAINED))


def methods_table() -> str:
    """What every method declares about itself, as a Markdown table: one row to a method."""
    columns = [field.name for field in fields(Taxonomy)]
    rows = [["method", *(column.replace("_", " ") for column in columns)], ["---"] * (len(columns) + 1)]
    rows += [
        [f"`{name}`", *(_cell(getattr(method.taxonomy, column)) for column in columns)]
        for name, method in METHODS.items()
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(value: str | Reference | None) -> str:
    if isinstance(value, Reference):
        return f"[{value.title}]({value.url})"
    return value or ""
