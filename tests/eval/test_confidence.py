from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from eval.confidence import asked, promises
from eval.prompts import Prompts
from eval.routing import experts_of
from router.calibration import Calibration, Curve
from router.encoder import Vectors
from router.held_out import HeldOut
from router.library import build
from router.method import Query
from router.methods.retrieval import Retrieval, RetrievalSettings


def test_the_figures_are_those_counted_by_hand() -> None:
    """Four prompts of two experts, two of nobody; the calibration lowers the bar from 0.5 to 0.2."""
    scores = np.array([[0.9, 0.1], [0.3, 0.1], [0.6, 0.4], [0.1, 0.8], [0.6, 0.1], [0.0, 0.3]])
    found = HeldOut(scores, np.full(6, 0.5), np.array([0, 0, 1, 1, -1, -1]), np.zeros(6, int))
    sure = Curve(x=(0.0,), y=(1.0,))
    after = Calibration(temperature=1.0, shift=-0.3, answered=sure, abstained=sure, nonconformity=(0.4,) * 19 + (0.7,))
    accepts, lost, error, *sets = promises(found, Calibration(temperature=1.0), after)
    assert accepts == "0.500 -> 1.000"
    assert lost == "0.333 -> 0.000"  # of the three that are best served by their own expert
    assert error.endswith("-> 0.325")  # always sure; wrong once of 4, and twice of 2 that weigh 0.1 / 0.9 * 4 / 2 each
    assert sets == ["0.750 of 1.0", "0.750 of 1.0", "1.000 of 2.0"]


def test_prompts_are_asked_in_order(words: Words) -> None:
    prompts = Prompts(
        samples={"a": ("one two", "one three"), "b": ("four five", "four six")},
        test=(("b", "four"), ("a", "one")),
        ood=(("", "seven"),),
    )
    library = build(experts_of(prompts.samples), words.encode, words.dim)
    method = Retrieval.fit(library, RetrievalSettings())
    found = asked(method, prompts, words)  # type: ignore[arg-type]
    assert found.own.tolist() == [1, 0, -1]
    everyone = np.ones(2, bool)
    for row, text in zip(found.scores, ("four", "one", "seven"), strict=True):
        np.testing.assert_array_equal(row, method.score(Query(text, words.encode([text])[0], everyone)))


class Words:
    """A text is the sum of one direction to each of its words."""

    id, dim = "words", 16

    def encode(self, texts: Sequence[str]) -> Vectors:
        total = np.stack([np.bincount([hash_of(word) for word in text.split()], minlength=16) for text in texts])
        unit: Vectors = (total / np.linalg.norm(total, axis=1, keepdims=True)).astype(np.float32)
        return unit


def hash_of(word: str) -> int:
    return sum(word.encode()) % 16


@pytest.fixture
def words() -> Words:
    return Words()
