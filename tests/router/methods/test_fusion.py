from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from adapters_registry.expert import Expert
from router.library import Library, build
from router.method import Query, decide, fitted
from router.methods.fusion import Fusion, FusionSettings
from router.methods.lda import LDA, LDASettings
from router.methods.lexical import Lexical, LexicalSettings
from router.methods.retrieval import own_threshold
from tests.router.conftest import WordsEncoder

MakeExpert = Callable[..., Expert]


@pytest.fixture
def library(make_expert: MakeExpert, words: WordsEncoder) -> Library:
    experts = [
        make_expert("capital", "capital of Peru", "capital of Norway", "capital of Chad"),
        make_expert("reverse", "spell house backwards", "spell tree backwards", "spell sun backwards"),
        make_expert("zero", description="sums of numbers"),
    ]
    return build(experts, words.encode, words.dim)


def query(library: Library, words: WordsEncoder, text: str, among: list[bool] | None = None) -> Query:
    return Query(text, words.encode([text])[0], np.array(among or [True] * len(library)))


def test_it_is_a_sum_whose_parts_are_fitted_once(library: Library, words: WordsEncoder) -> None:
    method = fitted(Fusion, library, FusionSettings(lexical=3))
    lda, lexical = fitted(LDA, library, LDASettings()), fitted(Lexical, library, LexicalSettings())
    assert (method.lda, method.lexical) == (lda, lexical)
    asked = query(library, words, "spell moon backwards")
    np.testing.assert_allclose(method.score(asked), lda.score(asked) + 3 * lexical.score(asked), atol=1e-5)


def test_it_routes_and_abstains(library: Library, words: WordsEncoder) -> None:
    method = Fusion.fit(library, FusionSettings())
    decision = decide("fusion", method, library, query(library, words, "spell moon backwards"))
    assert [each.expert for each in decision.experts] == ["reverse"]
    assert decide("fusion", method, library, query(library, words, "tell me jokes")).kind == "base"
    hidden = query(library, words, "spell moon backwards", [True, False, True])
    assert decide("fusion", method, library, hidden).kind == "base"


def test_a_successor_takes_over_what_was_read(library: Library, words: WordsEncoder, make_expert: MakeExpert) -> None:
    first = Fusion.fit(library, FusionSettings())
    more = build([*library.experts, make_expert("poem", "a poem on rain", "a poem on love")], words.encode, words.dim)
    second, anew = Fusion.fit(more, FusionSettings(), first), Fusion.fit(more, FusionSettings())
    asked = query(more, words, "a poem on the capital")
    np.testing.assert_allclose(second.score(asked), anew.score(asked), rtol=1e-4, atol=1e-4)
    assert second.lexical.profiles[library.keys[0]] is first.lexical.profiles[library.keys[0]]


def test_several_experts_answer_together(library: Library, words: WordsEncoder) -> None:
    method = Fusion.fit(library, FusionSettings(top_k=2, weights="uniform", threshold=-1000))
    decision = decide("fusion", method, library, query(library, words, "spell the capital backwards"))
    assert decision.kind == "blend"
    assert [each.weight for each in decision.experts] == [0.5, 0.5]


def well_apart(make_expert: MakeExpert, words: WordsEncoder) -> Library:
    things = ["house", "tree", "sun", "moon", "rain", "fish", "stone", "cloud", "river", "bread"]
    pairs = [(a, b) for a in things for b in things][:60]
    experts = [
        make_expert("capital", *(f"name the capital of {a} and {b} please" for a, b in pairs)),
        make_expert("reverse", *(f"spell {a} then {b} backwards now" for a, b in pairs)),
    ]
    return build(experts, words.encode, words.dim)


def test_retrieval_decides_between_what_own_and_what_foreign_samples_reach(
    make_expert: MakeExpert, words: WordsEncoder
) -> None:
    library = well_apart(make_expert, words)
    method = Fusion.fit(library, FusionSettings())
    assert method.thresholds is not None
    plain = [method.lda.score(each) + method.settings.lexical * method.lexical.score(each) for each in own(library)]
    foreign = np.median(
        [float((scores - method.thresholds)[1 - k]) for k, scores in zip([0, 1] * 60, plain, strict=True)]
    )
    assert foreign < 0
    for text in ("could you spell bread backwards for my friend", "tell me jokes", "the capital", "backwards"):
        asked = query(library, words, text)
        scores = method.lda.score(asked) + method.settings.lexical * method.lexical.score(asked)
        best = int(scores.argmax())
        above = scores[best] - method.thresholds[best]
        mean = library.prototypes[best].mean(axis=0)
        near = asked.vector @ mean / np.linalg.norm(mean) >= own_threshold(library.prototypes[best], "centroid")
        answered = above >= 0 or (above >= foreign and near)
        decision = decide("fusion", method, library, asked)
        assert (decision.kind == "select") == answered, text


def own(library: Library) -> list[Query]:
    """Samples of the two experts in turn."""
    pairs = [zip(library.texts[k], library.prototypes[k], strict=True) for k in (0, 1)]
    return [Query(text, vector, np.ones(2, bool)) for both in zip(*pairs, strict=True) for text, vector in both]


def test_experts_that_are_far_apart_answer_other_wordings(make_expert: MakeExpert, words: WordsEncoder) -> None:
    library = well_apart(make_expert, words)
    method = Fusion.fit(library, FusionSettings())
    decision = decide("fusion", method, library, query(library, words, "now spell me bread backwards"))
    assert [each.expert for each in decision.experts] == ["reverse"]
    assert decide("fusion", method, library, query(library, words, "tell me jokes")).kind == "base"
