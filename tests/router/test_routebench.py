"""Real prompts of 150 experts, if they are beside the repository: the baselines measured for all-MiniLM-L6-v2.

A part of them by default (some 20 s on a core of its own); all with MOERGE_ROUTEBENCH=full (ten minutes).
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from eval.metrics import top
from eval.prompts import Prompt
from eval.routebench import prompt_sets
from eval.routing import library_of, outcomes
from router.encoder import SentenceTransformerEncoder
from router.method import Query, decide
from router.methods.retrieval import Retrieval, RetrievalSettings

FOLDER = Path(__file__).parents[3] / "shared" / "routebench"
FULL = os.environ.get("MOERGE_ROUTEBENCH") == "full"

pytestmark = [
    pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no prompts in {FOLDER}"),
    pytest.mark.timeout(3600 if FULL else 300),
]

# form: samples per expert, test prompts per expert, top-1, top-3
CASES = {
    "instance": (20, 30, 0.437, 0.672) if FULL else (2, 1, 0.287, 0.493),
    "instruct": (20, 30, 0.945, 0.981) if FULL else (1, 1, 0.793, 0.900),
}


def first(prompts: tuple[Prompt, ...], n: int) -> list[Prompt]:
    """The first n prompts of every task."""
    seen: dict[str, int] = {}
    kept = []
    for task, text in prompts:
        seen[task] = seen.get(task, 0) + 1
        if seen[task] <= n:
            kept.append((task, text))
    return kept


@pytest.mark.parametrize("form", CASES)
def test_retrieval_reaches_the_measured_baseline_and_faiss_agrees_with_numpy(
    form: str, minilm: SentenceTransformerEncoder
) -> None:
    samples, tests, top1, top3 = CASES[form]
    prompts = prompt_sets(FOLDER)[f"ni150 {form}"]()
    register = [(task, text) for task, texts in prompts.samples.items() for text in texts[:samples]]
    test = first(prompts.test, tests)
    library = library_of(register, minilm.encode([text for _, text in register]))
    vectors = minilm.encode([text for _, text in test])
    assert len(library) == 150

    method = Retrieval.fit(library, RetrievalSettings(scoring="centroid"))
    sums = np.stack([rows.sum(axis=0) for rows in library.prototypes])  # (150, d)
    centroids = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    everyone = np.ones(len(library), bool)
    for vector in vectors:
        np.testing.assert_allclose(method.score(Query("", vector, everyone)), centroids @ vector, atol=2e-6)

    found = outcomes(test, [decide("centroid", method, library, Query("", vector, everyone), 3) for vector in vectors])
    assert top(found.rank, 1) == pytest.approx(top1, abs=0.01)
    assert top(found.rank, 3) == pytest.approx(top3, abs=0.01)
