"""What stands for an expert."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from adapters_registry.expert import Expert, Sample, State
from adapters_registry.prototypes import prototype_texts, prototypes_of


def expert(**details: Any) -> Expert:
    known = {"version": 1, "digest": "d" * 64, "state": State.ACTIVE, "path": Path("x"), "base_model": "b", "rank": 4}
    return Expert(name="pig-latin", target_modules=("q_proj",), source="upload", **known, **details)


@pytest.mark.parametrize(
    ("details", "texts"),
    [
        ({"samples": (Sample(prompt="one"), Sample(prompt="two")), "description": "three"}, ["one", "two"]),
        ({"description": "three"}, ["three"]),
        ({}, ["pig latin"]),
    ],
)
def test_samples_come_before_the_description_and_that_before_the_name(
    details: dict[str, Any], texts: list[str]
) -> None:
    assert prototype_texts(expert(**details)) == texts


def test_prototypes_are_the_embeddings_of_those_texts() -> None:
    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        return np.asarray([[len(text), 1] for text in texts], dtype=np.float32)

    matrix = prototypes_of(expert(samples=(Sample(prompt="ab"), Sample(prompt="abc"))), embed)
    np.testing.assert_array_equal(matrix, [[2, 1], [3, 1]])
    assert matrix.dtype == np.float32
