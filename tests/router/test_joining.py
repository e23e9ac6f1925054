from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from adapters_registry.expert import Expert
from router import joining as module
from router.calibration import Calibration
from router.held_out import FOLDS
from router.joining import Joining, joining
from router.library import Library
from router.router import Router, RouterSettings
from router.versions import Content, Learned
from tests.router.conftest import WordsEncoder

MakeExpert = Callable[..., Expert]
Answer = tuple[str, str | None, str | None]

TASKS = {
    "capital": "which capital city has {} as its country",
    "plural": "more than one {} are called plural",
    "reverse": "spell {} backwards letter by letter",
    "shout": "write {} in upper case letters",
    "vowels": "list all vowels found inside {}",
}
NOUNS = ["otter", "heron", "tiger", "apple", "stone", "river", "cloud", "piano", "wheel", "amber", "lemon", "table"]


def samples(task: str, nouns: Sequence[str] = NOUNS) -> list[str]:
    return [TASKS[task].format(noun) for noun in nouns]


@pytest.fixture
def experts(make_expert: MakeExpert) -> list[Expert]:
    return [make_expert(name, *samples(name)) for name in TASKS]


def served(words: WordsEncoder, experts: Sequence[Expert], method: str = "fusion", **settings: Any) -> Router:
    router = Router(words, RouterSettings(method=method, methods={method: settings}))
    router.refresh(experts)
    return router


def joined(router: Router, newcomer: Expert, **options: Any) -> Joining:
    library, name = router.library, router.settings.method
    assert library is not None
    vectors = router.embed([sample.prompt for sample in newcomer.samples])
    given = {"encoder": router.encoder_id, **options}
    return joining(library, newcomer, vectors, name, router.settings.methods[name], **given)


def by_new_routers(words: WordsEncoder, experts: Sequence[Expert], newcomer: Expert, method: str) -> set[Answer]:
    """The slow twin: for every fold, two routers that never saw its samples. Nobody's samples are copies here."""
    found = set()
    for fold in range(FOLDS):
        left = []
        for expert in [*experts, newcomer]:
            kept = tuple(sample for j, sample in enumerate(expert.samples) if j % FOLDS != fold)
            left.append(expert.model_copy(update={"samples": kept}))
        before, after = served(words, left[:-1], method), served(words, left, method)
        for expert in [*experts, newcomer]:
            for each in expert.samples[fold::FOLDS]:
                decisions = [router.route_sync(each.prompt) for router in (before, after)]
                one, other = (d.experts[0].expert if d.experts else None for d in decisions)
                found.add((each.prompt, one, other))
    return found


@pytest.mark.parametrize("method", ["fusion", "retrieval", "knn"])
def test_it_is_what_routers_say_that_never_saw_the_sample(
    words: WordsEncoder, experts: list[Expert], make_expert: MakeExpert, method: str
) -> None:
    mixed = samples("plural", ["boat", "fish", "cake", "drum"]) + samples("shout", ["boat", "fish", "cake", "drum"])
    newcomer = make_expert("newcomer", *mixed)
    found = joined(served(words, experts, method), newcomer)
    slow = by_new_routers(words, experts, newcomer, method)
    assert {(each.text, each.before, each.after) for each in found.own} == {e for e in slow if e[0] in mixed}
    others = {e for e in slow if e[0] not in mixed}
    assert {(each.text, each.before, each.after) for each in found.moved} == {e for e in others if e[1] != e[2]}
    assert found.asked == len(others)
    mine = {text: name for name in TASKS for text in samples(name)}
    assert found.top1_before == pytest.approx(sum(one == mine[text] for text, one, _ in others) / len(others))
    assert found.top1_after == pytest.approx(sum(other == mine[text] for text, _, other in others) / len(others))


def test_rows_add_up(words: WordsEncoder, experts: list[Expert], make_expert: MakeExpert) -> None:
    fresh = ["boat", "fish", "cake", "drum", "lamp", "coat", "mill", "bird"]
    newcomer = make_expert("newcomer", *samples("vowels", fresh), *samples("plural", fresh[:2]))
    found = joined(served(words, experts), newcomer)
    assert [row.expert for row in found.rows] == sorted(TASKS)
    for row in found.rows:
        assert row.samples == len(NOUNS)
        assert row.right_after == row.right_before - row.lost - row.abstained - row.elsewhere + row.gained
    assert found.lost == sum(row.lost for row in found.rows) > 0
    assert all(expert.lost == 0 for expert in found.rows if expert.expert in ("capital", "reverse", "shout"))
    said = json.loads(json.dumps(found.json()))
    assert said["asked"] == 5 * len(NOUNS)
    assert said["rows"][0]["expert"] == "capital"


def test_another_task_changes_nothing_and_is_reached(
    words: WordsEncoder, experts: list[Expert], make_expert: MakeExpert
) -> None:
    newcomer = make_expert("dates", *(f"what day falls {n} weeks after monday noon" for n in range(10)))
    found = joined(served(words, experts), newcomer)
    assert found.lost == 0
    assert found.top1_after >= found.top1_before - 0.05
    assert [each.after for each in found.own] == ["dates"] * 10
    assert all(each.before != "dates" for each in found.own)
    assert found.reached == 1


def test_a_duplicate_does_not_win_by_knowing_what_is_asked(
    words: WordsEncoder, experts: list[Expert], make_expert: MakeExpert
) -> None:
    """Held out of both, a sample is as near to one as to the other: the first name has it."""
    for name in ("aaa", "zzz"):
        found = joined(served(words, experts), make_expert(name, *samples("shout")))
        lost = {row.expert: row.lost for row in found.rows}
        assert lost == {**dict.fromkeys(TASKS, 0), "shout": len(NOUNS) if name == "aaa" else 0}
        assert found.reached == (name == "aaa")
        assert [each.before for each in found.own] == ["shout"] * len(NOUNS)


def test_a_new_version_takes_the_place_of_the_old_one(
    words: WordsEncoder, experts: list[Expert], make_expert: MakeExpert
) -> None:
    router = served(words, experts)
    newer = make_expert("shout", *samples("shout"), *samples("reverse", ["boat", "fish"]), version=2)
    found = joined(router, newer)
    assert "shout" not in [row.expert for row in found.rows]
    assert [each.sample for each in found.own] == list(range(len(NOUNS) + 2))
    assert {each.before for each in found.own[: len(NOUNS)]} == {"shout"}
    assert {each.after for each in found.own[: len(NOUNS)]} == {"shout"}


def test_an_expert_that_is_served_is_compared_with_its_absence(words: WordsEncoder, experts: list[Expert]) -> None:
    there, new = served(words, experts), served(words, experts[:3] + experts[4:])
    assert joined(there, experts[3]) == joined(new, experts[3])
    assert experts[3].name not in {each.before for each in joined(there, experts[3]).own}


def test_experts_of_others_are_neither_asked_nor_told_of(
    words: WordsEncoder, experts: list[Expert], make_expert: MakeExpert
) -> None:
    router = served(words, experts)
    assert router.library is not None
    among = np.array([expert.name != "shout" for expert in router.library.experts])
    found = joined(router, make_expert("zzz", *samples("shout", ["boat", "fish", "cake"])), among=among)
    assert "shout" not in {row.expert for row in found.rows}
    assert "shout" not in {each.before for each in (*found.own, *found.moved)}


def test_only_samples_are_asked_under_their_numbers(words: WordsEncoder, make_expert: MakeExpert) -> None:
    experts = [
        make_expert("described", description="spell words backwards"),
        make_expert("lone", samples("shout")[0]),
        make_expert("several", " ", *samples("plural")),
    ]
    found = joined(served(words, experts), make_expert("zzz", *samples("plural", ["boat", "fish"])), most=5)
    assert [(row.expert, row.samples) for row in found.rows] == [("several", 5)]
    assert {each.sample for each in found.moved} <= set(range(1, 6))
    assert [each.sample for each in found.own] == [0, 1]
    one = joined(served(words, experts), make_expert("zzz", "a single prompt"))
    assert (one.own, one.reached) == ((), 0)


def test_a_large_library_is_asked_until_it_is_enough(
    words: WordsEncoder, experts: list[Expert], make_expert: MakeExpert, monkeypatch: pytest.MonkeyPatch
) -> None:
    newcomer = make_expert("zzz", *samples("plural", ["boat", "fish"]))
    whole = joined(served(words, experts), newcomer)
    monkeypatch.setattr(module, "ENOUGH", 20)
    some = joined(served(words, experts), newcomer)
    assert some.asked == 5 * 6  # two of five folds
    assert set(some.moved) <= set(whole.moved)


def test_the_first_expert_takes_nothing_from_nobody(words: WordsEncoder, make_expert: MakeExpert) -> None:
    found = joined(served(words, []), make_expert("first", *samples("plural")))
    assert (found.rows, found.moved, found.top1_before, found.top1_after) == ((), (), 0, 0)
    assert {each.before for each in found.own} == {None}


def test_the_calibration_in_force_counts(words: WordsEncoder, experts: list[Expert], make_expert: MakeExpert) -> None:
    """One that moves every threshold out of reach: the base model answers all, before and after."""
    router = served(words, experts, "retrieval")
    settings = router._settings["retrieval"].model_dump_json()
    strict = Calibration(settings=settings, encoder=router.encoder_id, temperature=1.0, shift=9.0)
    kept = {"retrieval": strict.model_dump(mode="json")}
    learned = Learned(Content(number=1, created_at=datetime.now(UTC), calibration=kept))
    router.refresh(experts, learned=learned)
    newcomer = make_expert("zzz", *samples("shout", ["boat", "fish"]))
    found = joined(router, newcomer)
    assert (found.top1_before, found.top1_after, found.moved) == (0, 0, ())
    assert joined(router, newcomer, encoder="another").top1_before > 0.5


def test_mixtures_count_for_their_best_expert(
    words: WordsEncoder, experts: list[Expert], make_expert: MakeExpert
) -> None:
    newcomer = make_expert("zzz", *samples("shout", ["boat", "fish", "cake"]))
    assert joined(served(words, experts, top_k=3), newcomer).top1_before > 0.8


def test_the_libraries_given_are_as_they_were(
    words: WordsEncoder, experts: list[Expert], make_expert: MakeExpert
) -> None:
    router = served(words, experts)
    library = router.library
    assert library is not None
    rows = [group.copy() for group in library.prototypes]
    joined(router, make_expert("zzz", *samples("shout")))
    assert router.library is library
    assert _same(library, rows)


def _same(library: Library, rows: Sequence[Any]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(library.prototypes, rows, strict=True))
