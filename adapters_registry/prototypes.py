"""The prototypes of an expert: embeddings that a prompt is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from adapters_registry.expert import Expert

Embed = Callable[[Sequence[str]], NDArray[np.float32]]  # n texts -> (n, d)


def prototype_texts(expert: Expert) -> list[str]:
    """What stands for the expert: its sample prompts; without samples its description; without that its name."""
    if expert.samples:
        return [sample.prompt for sample in expert.samples]
    return [expert.description or expert.name.replace("-", " ").replace("_", " ")]


def prototypes_of(expert: Expert, embed: Embed) -> NDArray[np.float32]:
    """(n, d), one row for each of `prototype_texts`; their centroid is for the router to derive."""
    texts = prototype_texts(expert)
    matrix = np.asarray(embed(texts), dtype=np.float32)
    assert matrix.shape == (len(texts), matrix.shape[-1]), "an embedding for each text"
    return matrix
