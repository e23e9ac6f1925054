"""The rows that every run has: what is asked for them, and what follows from scores."""

from __future__ import annotations

from collections import Counter

import pytest

from eval.asking import Prompt
from eval.deciding import Planned
from eval.examples import Example
from eval.recipe import Recipe, uniform
from eval.records import REFERENCES, REGIMES, Record, Regime
from eval.references import EXPERT, MOST, drawn, fixed, infos, scored, together
from serving import extension

NAMES = ("a", "b", "c")


def example(name: str, *owners: str) -> Example:
    return Example(id=name, task=name.partition("/")[0], owners=owners, prompt=Prompt(text=name))


EXAMPLES = [example("a/0", "a"), example("a/1", "a"), example("b/0", "b"), example("ab/0", "b", "a"), example("none/0")]


@pytest.fixture(scope="module")
def rows() -> list[Planned]:
    return list(fixed(NAMES, EXAMPLES, seeds=(0, 1)))


def recipes(rows: list[Planned], router: str, regime: Regime, seed: int = 0) -> dict[str, Recipe]:
    return {
        each.example_id: each.recipe for each in rows if (each.router, each.regime, each.seed) == (router, regime, seed)
    }


@pytest.mark.parametrize("regime", REGIMES)
def test_what_is_asked_does_not_depend_on_scores(rows: list[Planned], regime: Regime) -> None:
    here = [each for each in EXAMPLES if each.owners or regime == "in-distribution"]
    gone = {each.id: set() if regime == "in-distribution" else set(each.owners) for each in here}
    assert recipes(rows, "base", regime) == {each.id: Recipe() for each in here}
    assert recipes(rows, "oracle", regime) == {
        each.id: Recipe.expert(each.owners[0]) if each.owners else Recipe() for each in here if len(each.owners) < 2
    }
    for name, recipe in recipes(rows, "uniform", regime).items():
        assert recipe == uniform([each for each in NAMES if each not in gone[name]])
    for seed in (0, 1):
        for name, recipe in recipes(rows, "random", regime, seed).items():
            assert recipe.kind == "select"
            assert recipe.names[0] not in gone[name]
        for recipe in recipes(rows, "random-weights", regime, seed).values():
            assert recipe.names[0] in {f"random-weights-{k}" for k in range(4)}
    assert recipes(rows, "oracle", regime, 1) == {}, "only what is drawn has several seeds"


def test_every_expert_is_asked_every_prompt_that_has_an_owner(rows: list[Planned]) -> None:
    matrix = [each for each in rows if each.router.startswith(EXPERT)]
    assert Counter(each.router for each in matrix) == {f"{EXPERT}{name}": 4 for name in NAMES}
    assert {(each.regime, each.seed) for each in matrix} == {("in-distribution", 0)}
    assert all(each.recipe == Recipe.expert(each.router.removeprefix(EXPERT)) for each in matrix)
    assert {each.rank for each in rows} == {0}, "they rank nobody"
    assert len(rows) == len({(each.router, each.regime, each.seed, each.example_id) for each in rows})


def test_where_nobody_is_left_the_base_model_answers() -> None:
    found = {each.router: each.recipe for each in fixed(("a",), EXAMPLES[:1], ("ood",)) if ":" not in each.router}
    assert found["random"] == found["uniform"] == found["base"] == Recipe()
    assert found["oracle"] == Recipe.expert("a")


def test_an_engine_without_random_adapters_has_no_such_row() -> None:
    assert "random-weights" not in {each.router for each in fixed(NAMES, EXAMPLES, random_weights=())}


def test_what_is_drawn_is_equally_likely_and_the_same_in_every_process() -> None:
    some = [example(f"t/{n}") for n in range(3000)]
    counts = Counter(drawn(NAMES, 0, each) for each in some)
    assert all(abs(count - 1000) < 150 for count in counts.values())
    assert [drawn(NAMES, 0, each) for each in some[:6]] == ["c", "c", "a", "c", "c", "b"]
    agreed = sum(drawn(NAMES, 0, each) == drawn(NAMES, 1, each) for each in some)
    assert abs(agreed - 1000) < 150


def test_rows_say_what_they_are() -> None:
    assert [each.name for each in infos(("x",))] == [*REFERENCES, "expert:x"]
    assert {each.kind for each in infos()} == {"reference"}
    assert infos(("x",))[-1].kind == "expert"


# From scores

#          base  a    b    c
SCORES = {
    "a/0": (0.0, 1.0, 1.0, 0.0),
    "a/1": (0.5, 0.5, 0.0, 0.5),
    "b/0": (0.0, 0.0, 1.0, 0.2),
    "ab/0": (0.0, 0.4, 0.3, 0.8),
}


def records(scores: dict[str, tuple[float | None, ...]]) -> list[Record]:
    found = []
    for one in EXAMPLES:
        for router, score in zip(("base", *NAMES), scores.get(one.id, (None,)), strict=False):
            chosen = (
                {"kind": "base"}
                if router == "base"
                else {"kind": "select", "experts": ((router, 1.0),), "adapter": router, "flops": 7.0}
            )
            found.append(
                Record.model_validate(
                    {
                        "router": "base" if router == "base" else EXPERT + router,
                        "regime": "in-distribution",
                        "example": one.id,
                        "task": one.task,
                        "owners": one.owners,
                        "score": score,
                        "answer": f"{router} on {one.id}",
                        **chosen,
                    }
                )
            )
    return found


def who(found: list[Record], router: str, regime: Regime) -> dict[str, str]:
    """Who answered each prompt, and that it is that one's own record."""
    names = {}
    for each in found:
        if (each.router, each.regime) == (router, regime):
            names[each.example] = each.experts[0][0] if each.experts else "base"
            if each.owners:
                assert each.answer == f"{names[each.example]} on {each.example}"
                assert each.score == SCORES[each.example][("base", *NAMES).index(names[each.example])]
    return names


def test_the_best_of_a_prompt_the_base_model_first_then_by_name() -> None:
    found = list(scored(records(SCORES), EXAMPLES))  # type: ignore[arg-type]
    assert who(found, "best-per-query", "in-distribution") == {
        "a/0": "a",  # before b, which is as good
        "a/1": "base",
        "b/0": "b",
        "ab/0": "c",
        "none/0": "base",
    }
    for regime in ("semi-ood", "ood"):
        assert who(found, "best-per-query", regime) == {"a/0": "b", "a/1": "base", "b/0": "c", "ab/0": "c"}


def test_the_best_single_expert_is_the_one_with_the_best_normalised_score() -> None:
    found = list(scored(records(SCORES), EXAMPLES))  # type: ignore[arg-type]
    # Oracles: a .75, b 1, ab .4. In-distribution a: 1, 0, 1; b: 2/3, 1, 3/4; c: 1/3, 1/5, 2.
    assert set(who(found, "best-single", "in-distribution").values()) == {"c"}
    # Where they are allowed: a on b 0; b on a 2/3; c as before, .84.
    assert who(found, "best-single", "semi-ood") == {"a/0": "c", "a/1": "c", "b/0": "c", "ab/0": "c"}
    worse = {key: (*row[:3], 0.0) for key, row in SCORES.items()}
    again = list(scored(records(worse), EXAMPLES))  # type: ignore[arg-type]
    single = {
        each.example: each.experts[0][0]
        for each in again
        if (each.router, each.regime) == ("best-single", "in-distribution")
    }
    assert set(single.values()) == {"b"}, ".81 against .67"
    ood = {each.example: each.experts[0][0] for each in again if (each.router, each.regime) == ("best-single", "ood")}
    assert ood == {"a/0": "b", "a/1": "b", "b/0": "a", "ab/0": "c"}


def test_the_oracle_of_a_composition_is_the_owner_that_does_best_on_its_task() -> None:
    more = [*EXAMPLES, example("ab/1", "a", "b")]
    scores = {**SCORES, "ab/1": (0.0, 0.0, 0.2, 1.0)}
    rows = [*records(scores)]  # type: ignore[arg-type]
    rows += [
        row.model_copy(update={"example": "ab/1", "owners": ("a", "b"), "score": score})
        for row, score in zip([r for r in rows if r.example == "ab/0"], scores["ab/1"], strict=True)
    ]
    found = [each for each in scored(rows, more) if each.router == "oracle"]
    assert {each.experts[0][0] for each in found} == {"b"}, "(.3 + .2) / 2 against (.4 + 0) / 2"
    assert Counter((each.example, each.regime) for each in found) == {
        (name, regime): 1 for name in ("ab/0", "ab/1") for regime in REGIMES
    }


def test_prompts_for_nobody_are_answered_by_the_best_single_expert_without_being_asked() -> None:
    found = {each.router: each for each in scored(records(SCORES), EXAMPLES) if each.example == "none/0"}  # type: ignore[arg-type]
    assert found.keys() == {"best-single", "best-per-query"}
    single = found["best-single"]
    assert (single.kind, single.experts, single.adapter, single.flops) == ("select", (("c", 1.0),), "c", 7.0)
    assert single.score is None


def test_all_rows_of_all_regimes_are_there_together() -> None:
    """Each row once for each prompt of a regime, whichever of the two steps it is from."""
    both = Counter((each.router, each.regime, each.example_id) for each in fixed(NAMES, EXAMPLES))
    both += Counter((each.router, each.regime, each.example) for each in scored(records(SCORES), EXAMPLES))  # type: ignore[arg-type]
    for regime in REGIMES:
        here = [each for each in EXAMPLES if each.owners or regime == "in-distribution"]
        assert {(name, one.id): both[name, regime, one.id] for name in REFERENCES for one in here} == {
            (name, one.id): 1 for name in REFERENCES for one in here
        }
    assert set(both.values()) == {1}


def test_what_has_no_score_is_passed_over() -> None:
    missing = {**SCORES, "a/0": (None, None, 0.1, None)}
    found = list(scored(records(missing), EXAMPLES))  # type: ignore[arg-type]
    best = next(each for each in found if each.router == "best-per-query" and each.example == "a/0")
    assert best.score == 0.1
    nothing = list(scored(records({}), EXAMPLES))
    assert {each.router for each in nothing} == {"best-single", "best-per-query"}
    assert {each.kind for each in nothing} == {"base"}
    assert list(scored([], EXAMPLES)) == []


def test_scores_below_zero_are_compared_as_they_are() -> None:
    """Mean log-likelihoods: no share of an oracle means anything."""
    negative = {key: tuple(score - 2 for score in row) for key, row in SCORES.items()}
    found = [each for each in scored(records(negative), EXAMPLES) if each.regime == "in-distribution"]  # type: ignore[arg-type]
    single = {each.experts[0][0] for each in found if each.router == "best-single"}
    assert single == {"b"}, "by means over tasks: a .38, b .6, c .42"
    best = {each.example: each.score for each in found if each.router == "best-per-query" and each.owners}
    assert best == {key: max(row) for key, row in negative.items()}


def test_of_many_experts_a_request_names_as_many_as_it_may() -> None:
    names = [f"expert-{n}" for n in range(100)]
    some = together(names)
    assert len(some) == MOST == extension.MOST
    assert some == sorted(some)
    assert len(set(some) & set(together(names[1:]))) >= MOST - 1
    assert together(names[:MOST]) == sorted(names[:MOST])
