"""Retrieve, then gate: who gets on the shortlist, and with which weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from adapters_registry.expert import Expert
from router.decision import Decision, Verdict
from router.gating import GATES
from router.library import Library, build
from router.method import Query, decide, fitted
from router.methods import METHODS, SERVED
from router.methods.gated import NAMES, Gated
from router.methods.retrieval import Retrieval
from router.router import Router, RouterSettings

MakeExpert = Callable[..., Expert]
SAMPLES = {
    "count": ("how many letters has banana", "how many letters has window"),
    "length": ("how many words has banana", "how many words has window"),
    "reverse": ("spell banana backwards", "spell window backwards"),
    "shout": ("write banana loudly", "write window loudly"),
    "whisper": ("write banana quietly", "write window quietly"),
}
REVERSE, WRITE, NEITHER = "spell cherry backwards", "write cherry loudly", "zebra quartz"


@pytest.fixture
def experts(make_expert: MakeExpert) -> list[Expert]:
    return [make_expert(name, *samples) for name, samples in SAMPLES.items()]


def route(words: Any, experts: list[Expert], text: str, name: str = "arrow", max_rank: Any = None, **settings: Any):
    library = build(experts, words.encode, words.dim, max_rank=max_rank)
    return routed(words, library, text, name, **settings)


def routed(words: Any, library: Library, text: str, name: str, **settings: Any) -> Decision:
    kind = METHODS[name]
    method = kind.fit(library, kind.Settings.model_validate(settings))
    return decide(name, method, library, Query(text, words.encode([text])[0], library.visible(None)))


def names(decision: Decision) -> list[str]:
    return [each.expert for each in decision.experts]


def test_every_gate_is_a_method_and_those_that_need_nothing_else_are_served() -> None:
    assert tuple(GATES) == NAMES
    assert set(NAMES) < METHODS.keys()
    assert set(SERVED) == {"fusion", "retrieval", *(name for name, gate in GATES.items() if not gate.extra)}
    assert [METHODS[name].taxonomy for name in GATES] == [gate.taxonomy for gate in GATES.values()]
    assert RouterSettings().methods == {name: {} for name in SERVED}


def test_the_shortlist_is_retrieval_s_best_in_the_order_of_names(words: Any, experts: list[Expert]) -> None:
    decision = route(words, experts, WRITE, shortlist=2)
    assert (decision.kind, decision.gate, decision.verdict) == ("gate", "arrow", None)
    assert names(decision) == ["shout", "whisper"]
    assert [each.weight for each in decision.experts] == [0.5, 0.5]
    assert decision.gate_settings == GATES["arrow"].Settings().model_dump(mode="json")
    assert decision.candidates[0].expert == "shout"
    assert names(route(words, experts, WRITE.replace("loudly", "quietly"), shortlist=2)) == ["shout", "whisper"]


def test_far_from_every_expert_the_base_model_answers(words: Any, experts: list[Expert]) -> None:
    decision = route(words, experts, NEITHER)
    assert (decision.kind, decision.gate) == ("base", None)
    assert route(words, experts, NEITHER, threshold=-1).kind == "gate"


def test_the_gate_s_settings_travel_with_the_decision(words: Any, experts: list[Expert]) -> None:
    assert route(words, experts, WRITE, gate={"top_k": 1}).gate_settings["top_k"] == 1


def test_probability_mass_ends_the_shortlist(words: Any, experts: list[Expert]) -> None:
    sure = route(words, experts, REVERSE, mass=0.5, scoring="best")
    assert (sure.kind, names(sure)) == ("select", ["reverse"])
    assert len(names(route(words, experts, REVERSE, mass=1.0, shortlist=4))) == 4


def test_experts_without_samples_take_turns_in_the_last_place(
    words: Any, experts: list[Expert], make_expert: MakeExpert
) -> None:
    cold = [make_expert(name) for name in ("cold-a", "cold-b", "cold-c")]
    found = [names(route(words, [*experts, *cold], f"{WRITE} {k}", shortlist=2)) for k in range(40)]
    assert {each for pair in found for each in pair if each.startswith("cold")} == {"cold-a", "cold-b", "cold-c"}
    assert all(sum(each.startswith("cold") for each in pair) == 1 for pair in found)
    assert names(route(words, [*experts, *cold], f"{WRITE} 1", shortlist=2)) == found[1]  # and a prompt has its own
    assert names(route(words, [*experts, *cold], WRITE, shortlist=2, cold=0)) == ["shout", "whisper"]


def test_with_experts_that_retrieval_cannot_judge_the_gate_decides(
    words: Any, experts: list[Expert], make_expert: MakeExpert
) -> None:
    found = route(words, [*experts, make_expert("cold")], NEITHER)
    assert found.kind == "gate"
    assert "cold" in names(found)
    assert route(words, [*experts, make_expert("cold")], NEITHER, cold=0).kind == "base"
    assert names(route(words, [make_expert("cold-a"), make_expert("cold-b")], NEITHER, cold=4)) == ["cold-a", "cold-b"]


def test_experts_without_samples_fill_the_places_that_are_left(words: Any, make_expert: MakeExpert) -> None:
    cold = [make_expert(name) for name in ("cold-a", "cold-b", "cold-c")]
    assert names(route(words, cold, NEITHER)) == ["cold-a", "cold-b", "cold-c"]
    known = make_expert("reverse", *SAMPLES["reverse"])
    assert names(route(words, [*cold, known], REVERSE)) == ["cold-a", "cold-b", "cold-c", "reverse"]
    assert len(names(route(words, cold, NEITHER, shortlist=2))) == 2
    assert route(words, cold, NEITHER, cold=0).kind == "base"
    assert route(words, cold, NEITHER, cold=0, threshold=-1).kind == "gate"


def test_the_same_adapter_under_two_names_has_one_place(words: Any, make_expert: MakeExpert) -> None:
    again = [make_expert(name, *SAMPLES["shout"], digest="d" * 64) for name in ("again", "shout")]
    other = make_expert("whisper", *SAMPLES["whisper"])
    assert names(route(words, [*again, other], WRITE)) == ["again", "whisper"]
    assert names(route(words, again, WRITE)) == ["again"]


def test_a_shortlist_is_cut_to_the_engine_s_rank_and_says_so(words: Any, experts: list[Expert]) -> None:
    decision = route(words, experts, REVERSE, max_rank=16)  # of experts of rank 8
    assert len(decision.experts) == 2
    assert "reverse" in names(decision)
    assert decision.reason == "2 of 4 experts fit a composite of 16 rows"
    alone = route(words, experts, REVERSE, max_rank=8)
    assert (alone.kind, names(alone)) == ("select", ["reverse"])
    assert "1 of 4 experts" in alone.reason
    assert route(words, experts, REVERSE, max_rank=32).reason == ""


def test_a_cut_keeps_the_place_for_experts_without_samples(
    words: Any, experts: list[Expert], make_expert: MakeExpert
) -> None:
    assert names(route(words, [*experts, make_expert("cold")], REVERSE, max_rank=16)) == ["cold", "reverse"]


def test_a_fixed_group_answers_everything(words: Any, experts: list[Expert]) -> None:
    decision = route(words, experts, NEITHER, group=["whisper", "count", "unheard-of"])
    assert (decision.kind, names(decision)) == ("gate", ["count", "whisper"])
    assert decision.threshold is None
    alone = route(words, experts, NEITHER, group=["count"])
    assert (alone.kind, names(alone)) == ("select", ["count"])
    assert route(words, experts, NEITHER, group=["unheard-of"]).kind == "base"


def test_a_fixed_group_is_not_encoded_for_unless_weights_are_wanted(words: Any, experts: list[Expert]) -> None:
    library = build(experts, words.encode, words.dim)
    settings = METHODS["arrow"].Settings.model_validate({"group": ["count", "shout"]})
    assert not METHODS["arrow"].fit(library, settings).encodes
    assert METHODS["arrow"].fit(library, METHODS["arrow"].Settings()).encodes


def test_only_what_the_caller_may_see_is_shortlisted(words: Any, make_expert: MakeExpert) -> None:
    experts = [make_expert(name, *samples, owner="ann", visibility="private") for name, samples in SAMPLES.items()]
    experts[2] = make_expert("reverse", *SAMPLES["reverse"])
    library = build([*experts, make_expert("hidden", owner="ann", visibility="private")], words.encode, words.dim)
    method = METHODS["arrow"].fit(library, METHODS["arrow"].Settings())
    query = Query(REVERSE, words.encode([REVERSE])[0], library.visible("bob"))
    decision = decide("arrow", method, library, query)
    assert (decision.kind, names(decision)) == ("select", ["reverse"])
    assert {each.expert for each in decision.candidates} == {"reverse"}


def test_a_mixture_is_weighted_by_retrieval(words: Any, experts: list[Expert], make_expert: MakeExpert) -> None:
    decision = route(words, experts, WRITE, "constant", shortlist=3, temperature=0.2)
    scores = {each.expert: each.score for each in decision.candidates}
    expected = np.exp([scores[name] / 0.2 for name in names(decision)])
    weights = [each.weight for each in decision.experts]
    np.testing.assert_allclose(weights, expected / expected.sum(), rtol=1e-6)
    cold = route(words, [*experts, make_expert("cold")], WRITE, "constant", shortlist=4)
    assert {each.expert: each.weight for each in cold.experts}["cold"] == pytest.approx(1 / 4)
    assert sum(each.weight for each in cold.experts) == pytest.approx(1)


def test_a_probe_says_what_follows_from_it(words: Any, experts: list[Expert]) -> None:
    plain = route(words, experts, WRITE, "probe", prior=False)
    assert (plain.gate, plain.verdict) == ("probe", Verdict())
    assert len({each.weight for each in plain.experts}) == 1
    prior = route(words, experts, WRITE, "probe", blend=True)
    assert prior.verdict == Verdict(blend=True)
    assert max(prior.experts, key=lambda each: each.weight).expert == "shout"


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"shortlist": 1}, "shortlist"),
        ({"mass": 0}, "mass"),
        ({"gate": {"top_k": 0}}, "top_k"),
        ({"gate": {"froce": 1}}, "froce"),
        ({"froce": 1}, "froce"),
        ({"prior": True}, "prior"),  # Arrow takes no weights
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError) as caught:
        RouterSettings(methods={"retrieval": {}, "arrow": settings})
    assert says in str(caught.value)


def test_a_mixture_is_not_given_weights_that_nobody_would_use() -> None:
    with pytest.raises(ValidationError, match="weights are retrieval's"):
        RouterSettings(methods={"retrieval": {}, "constant": {"gate": {"weights": [0.5, 0.5]}}})


def test_methods_that_agree_share_one_index_over_refreshes(words: Any, experts: list[Expert]) -> None:
    router = Router(words, RouterSettings(methods={"retrieval": {}, "arrow": {}, "lag": {"k": 7}}))
    for chosen in (experts[:3], experts):
        router.refresh(chosen)
        assert router._snapshot is not None
        retrieval, arrow = (router._snapshot.methods[name] for name in ("retrieval", "arrow"))
        assert isinstance(arrow, Gated)
        assert arrow.retrieval is retrieval
        assert isinstance(retrieval, Retrieval)
        assert len(retrieval.index) == len(chosen)
        lag = router._snapshot.methods["lag"]
        assert isinstance(lag, Gated)
        assert lag.retrieval is not retrieval
    router.close()


def test_what_is_fitted_for_a_library_is_fitted_once(words: Any, experts: list[Expert]) -> None:
    library = build(experts, words.encode, words.dim)
    settings = Retrieval.Settings()
    assert fitted(Retrieval, library, settings) is fitted(Retrieval, library, Retrieval.Settings())
    assert fitted(Retrieval, build(experts, words.encode, words.dim), settings) is not fitted(
        Retrieval, library, settings
    )
