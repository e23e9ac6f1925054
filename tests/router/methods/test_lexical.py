from __future__ import annotations

from collections.abc import Callable
from math import log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_registry.expert import Expert
from router.features import BUCKETS, FAMILIES, WIDTH, characters, grams, ngrams, shape
from router.library import Library, build
from router.method import Query, decide
from router.methods.lexical import Lexical, LexicalSettings, columns

MakeExpert = Callable[..., Expert]
SAMPLES = {
    "empty": [],
    "nli": ["Sentence 1: It rains. Sentence 2: It is wet.", "Sentence 1: He ran. Sentence 2: He sat."],
    "reverse": ["Spell house backwards", "Spell 'tree' backwards!", "Spell sun backwards"],
    "sums": ["12 + 7 = ?", "3 + 44 = ?"],
    "übersetzung": ["Übersetze: 你好 👋", "Übersetze: 再见 👋👋"],
}


def library_of(make_expert: MakeExpert, samples: dict[str, list[str]]) -> Library:
    experts = [make_expert(name, *texts, description="" if texts else name) for name, texts in samples.items()]
    return build(experts, lambda texts: np.ones((len(texts), 2), np.float32), 2)


def ask(library: Library, text: str) -> Query:
    return Query(text, np.zeros(2, np.float32), np.ones(len(library), bool))


def dense(text: str) -> np.ndarray:
    row = np.zeros(WIDTH)
    found = grams(text)
    row[found.buckets] = found.weights
    return row.reshape(len(FAMILIES), BUCKETS)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-9)


def test_scores_are_cosines_of_dense_vectors(make_expert: MakeExpert) -> None:
    """The slow twin: the class' docstring with arrays of all buckets."""
    library = library_of(make_expert, SAMPLES)
    method = Lexical.fit(library, LexicalSettings())
    means = np.stack([np.mean([dense(text) for text in texts], axis=0) for texts in library.texts])
    df = sum(np.mean([dense(text) > 0 for text in texts], axis=0) for texts in library.texts)
    idf = 1 + np.log((1 + len(library)) / (1 + df))
    rows = unit(means * idf) * np.linalg.norm(means, axis=-1, keepdims=True)  # (n, families, BUCKETS)
    rows = unit(rows.reshape(len(library), WIDTH))
    for text in ("Spell car backwards", "Sentence 1: A.", "1 + 1", "hello 👋", "z"):
        q = unit(unit(dense(text) * idf).reshape(WIDTH))
        np.testing.assert_allclose(method.score(ask(library, text)), rows @ q, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Spell moon backwards", "reverse"),
        ("Sentence 1: She left. Sentence 2: She went.", "nli"),
        ("99 + 1 = ?", "sums"),
        ("Übersetze: 谢谢", "übersetzung"),
    ],
)
def test_a_prompt_finds_the_expert_whose_samples_are_written_like_it(
    make_expert: MakeExpert, text: str, wanted: str
) -> None:
    library = library_of(make_expert, SAMPLES)
    decision = decide("x", Lexical.fit(library, LexicalSettings()), library, ask(library, text))
    assert [each.expert for each in decision.experts] == [wanted]


def test_a_prompt_like_none_is_the_base_model_s(make_expert: MakeExpert) -> None:
    library = library_of(make_expert, SAMPLES)
    decision = decide("x", Lexical.fit(library, LexicalSettings()), library, ask(library, "QWERTZ; JKL"))
    assert decision.kind == "base"


def test_experts_that_come_and_go_give_what_a_new_fit_gives(make_expert: MakeExpert) -> None:
    method: Lexical | None = None
    for names in (["nli"], ["nli", "sums", "reverse"], ["reverse"], [], ["empty", "sums"]):
        library = library_of(make_expert, {name: SAMPLES[name] for name in sorted(names)})
        method = Lexical.fit(library, LexicalSettings(), method)
        anew = Lexical.fit(library, LexicalSettings())
        query = ask(library, "3 + 4 = house")
        np.testing.assert_array_equal(method.score(query), anew.score(query))


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=60))
def test_any_text_has_n_grams_of_length_1_in_each_family(text: str) -> None:
    found = grams(text)
    assert (np.diff(found.buckets) > 0).all()
    assert not len(found.buckets) or (found.buckets[0] >= 0 and found.buckets[-1] < WIDTH)
    families = np.bincount(found.buckets // BUCKETS, found.weights.astype(float) ** 2, len(FAMILIES))
    assert all(value == pytest.approx(1, abs=1e-4) or value == 0 for value in families)


def test_n_grams_are_hashed_alike_wherever_they_stand() -> None:
    """The slow twin: every run hashed by itself, with Python's integers."""

    def one(run: list[int]) -> int:
        h = 1
        for item in run:
            h = ((h ^ h >> 29) * 0x9E3779B97F4A7C15 + item) % 2**64
        return (h ^ h >> 32) * 0x9E3779B97F4A7C15 % 2**64

    items = [ord(c) for c in "ab👋ab cab"]
    wanted = [one(items[i : i + n]) for n in (2, 3) for i in range(len(items) - n + 1)]
    assert ngrams(characters("ab👋ab cab"), 2, 3).tolist() == wanted
    assert ngrams(characters(""), 1, 3).tolist() == []


def test_shape_and_weights() -> None:
    assert shape("Sentence 12: It rained.") == "Xx 9: Xx x."
    found = grams("a a a b")
    word = found.weights[found.buckets < BUCKETS]  # a, b, "a a", "a b"
    wanted = np.array([1, 1, 1 + log(2), 1 + log(3)])
    np.testing.assert_allclose(np.sort(word), np.sort(wanted / np.linalg.norm(wanted)), rtol=1e-5)


def test_columns_are_summed_as_a_matrix_product_does() -> None:
    from scipy import sparse

    matrix = sparse.random_array((6, 20), density=0.3, rng=np.random.default_rng(0), format="csc")
    which, weights = np.array([0, 3, 4, 19]), np.array([1, 2, 0.5, -1], np.float32)
    np.testing.assert_allclose(columns(matrix, which, weights), matrix.toarray()[:, which] @ weights)
    assert columns(matrix, which[:0], weights[:0]).tolist() == [0] * 6
