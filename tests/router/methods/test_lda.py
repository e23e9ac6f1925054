from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from router.encoder import Vectors
from router.method import Query, decide
from router.methods.lda import BACKGROUND, LDA, LDASettings
from router.methods.lexical import Lexical, LexicalSettings
from tests.router.methods.conftest import DIM, MakeExpert, ask, groups_of, library_of, unit


def by_formula(groups: Sequence[Vectors], q: Vectors, shrinkage: float | None) -> Vectors:
    """The slow twin: the class' docstring, one expert after the other."""
    rows = [each.astype(np.float64) for each in groups]
    means = [each.mean(axis=0) for each in rows]
    S = sum((x - m)[:, None] * (x - m)[None] for each, m in zip(rows, means, strict=True) for x in each)
    f = sum(len(each) - 1 for each in rows)
    rho = DIM / (f + DIM) if shrinkage is None else shrinkage
    W = (1 - rho) * S / f + rho * np.trace(S) / (f * DIM) * np.eye(DIM)
    inverse = np.linalg.inv(W)
    ratio = inverse @ S / f
    u = np.sqrt(2 * np.trace(ratio @ ratio))

    def d2(m: Vectors) -> float:
        return float((q - m) @ inverse @ (q - m))

    middle = np.mean(means, axis=0)
    scores = [(BACKGROUND * d2(middle) - d2(m)) / (1 + 1 / len(x)) / u for x, m in zip(rows, means, strict=True)]
    return np.array(scores)


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=6), shrinkage=st.sampled_from([None, 0.1, 1.0]))
def test_scores_are_those_of_the_formula(make_expert: MakeExpert, sizes: list[int], shrinkage: float | None) -> None:
    groups = groups_of([*sizes, 3])
    library = library_of(make_expert, groups)
    method = LDA.fit(library, LDASettings(shrinkage=shrinkage))
    for q in unit(np.random.default_rng(1).standard_normal((5, DIM))):
        wanted = by_formula(list(groups.values()), q, shrinkage)
        np.testing.assert_allclose(method.score(ask(library, q)), wanted, atol=2e-3, rtol=1e-3)


def test_with_equal_sizes_it_ranks_as_linear_discriminant_analysis(make_expert: MakeExpert) -> None:
    groups = groups_of([20] * 4)
    library = library_of(make_expert, groups)
    method = LDA.fit(library, LDASettings(shrinkage=1e-6))
    X, y = np.concatenate(list(groups.values())), np.repeat(np.arange(4), 20)
    other = LinearDiscriminantAnalysis(solver="lsqr", priors=np.full(4, 0.25)).fit(X, y)
    for q in unit(np.random.default_rng(2).standard_normal((20, DIM))):
        np.testing.assert_array_equal(
            np.argsort(method.score(ask(library, q))), np.argsort(other.decision_function(q[None])[0])
        )


def test_directions_in_which_all_samples_scatter_count_less(make_expert: MakeExpert) -> None:
    axis = np.eye(DIM, dtype=np.float32)
    noise = 0.7 * axis[4] * np.linspace(-1, 1, 10, dtype=np.float32)[:, None]
    groups = {"a": unit(axis[0] + noise), "b": unit(axis[0] + 0.2 * axis[1] + noise)}
    library = library_of(make_expert, groups)
    method = LDA.fit(library, LDASettings(shrinkage=0.01))
    q = unit((axis[0] + 0.2 * axis[1] + 3 * axis[4])[None])[0]
    assert decide("x", method, library, ask(library, q)).candidates[0].expert == "b"


def test_experts_that_come_and_go_change_what_a_new_fit_gives(make_expert: MakeExpert) -> None:
    groups = groups_of([6, 1, 4, 8])
    method: LDA | None = None
    for names in (["e0"], ["e0", "e1", "e3"], ["e1", "e2", "e3"], [], ["e2", "e3"]):
        library = library_of(make_expert, {name: groups[name] for name in names})
        method = LDA.fit(library, LDASettings(), method)
        anew = LDA.fit(library, LDASettings())
        assert method.thresholds is not None
        assert anew.thresholds is not None
        np.testing.assert_allclose(method.thresholds, anew.thresholds, rtol=1e-5)
        for q in unit(np.random.default_rng(3).standard_normal((3, DIM))):
            np.testing.assert_allclose(method.score(ask(library, q)), anew.score(ask(library, q)), rtol=1e-4, atol=1e-4)


def test_the_threshold_is_what_held_out_samples_reach(make_expert: MakeExpert) -> None:
    """The slow twin: fits without each sample in turn. All that stays as it is are the middle, u and t."""
    groups = groups_of([12] * 5)
    library = library_of(make_expert, groups)
    method = LDA.fit(library, LDASettings())
    held = []
    for k, (name, rows) in enumerate(groups.items()):
        for j in range(len(rows)):
            rest = library_of(make_expert, groups | {name: np.delete(rows, j, axis=0)})
            held.append(LDA.fit(rest, LDASettings()).score(ask(rest, rows[j]))[k])
    assert method.thresholds is not None
    assert method.thresholds[0] == pytest.approx(np.quantile(held, 0.02), rel=0.1, abs=0.1)


@pytest.mark.parametrize("rows", [1, 3])
def test_identical_samples_and_single_ones_are_fine(make_expert: MakeExpert, rows: int) -> None:
    axis = np.eye(DIM, dtype=np.float32)
    library = library_of(make_expert, {"a": axis[[0] * rows], "b": axis[[1] * rows], "twin": axis[[1] * rows]})
    method = LDA.fit(library, LDASettings())
    decision = decide("x", method, library, ask(library, axis[0]))
    assert [each.expert for each in decision.experts] == ["a"]
    assert 0 <= decision.confidence <= 1
    assert decide("x", method, library, ask(library, axis[1])).experts[0].expert == "b"  # ties: the first name


def test_an_expert_without_embeddings_is_not_scored_and_none_at_all_abstains(make_expert: MakeExpert) -> None:
    library = library_of(make_expert, groups_of([4, 0, 4]))
    scores = LDA.fit(library, LDASettings()).score(ask(library, np.eye(DIM, dtype=np.float32)[0]))
    assert np.isfinite(scores).tolist() == [True, False, True]
    nobody = library_of(make_expert, {})
    assert decide("x", LDA.fit(nobody, LDASettings()), nobody, ask(nobody, np.zeros(DIM, np.float32))).kind == "base"


@pytest.mark.parametrize("kind", [LDA, Lexical])
def test_scores_of_the_visible_are_the_same_whoever_is_hidden(make_expert: MakeExpert, kind: type) -> None:
    library = library_of(make_expert, groups_of([4, 4, 4]))
    method = kind.fit(library, LDASettings() if kind is LDA else LexicalSettings())
    vector = np.eye(DIM, dtype=np.float32)[1]
    some = method.score(Query("a sample", vector, np.array([True, False, True])))
    np.testing.assert_array_equal(
        some, method.score(ask(library, vector) if kind is LDA else Query("a sample", vector, np.ones(3, bool)))
    )
