"""Whom every row would have answer: against routers asked directly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from adapters_registry.expert import Expert, Sample
from adapters_registry.proposal import FolderSource, HubSource, Proposal
from adapters_registry.store import content_digest
from eval import deciding
from eval.asking import Prompt
from eval.cache import Cache
from eval.deciding import NotAskable, Planned, Routers, Timed, grouped, known_experts, plan
from eval.encodings import Remembering
from eval.examples import Example
from eval.recipe import Recipe, uniform
from eval.suite import Blend, RouterEntry
from router.methods import METHODS
from router.router import Router, RouterSettings
from tests.router.conftest import WordsEncoder

WORDS = {
    "boats": ("sail hull anchor", "hull rope mast", "anchor mast sail", "rope sail hull"),
    "cakes": ("flour sugar egg", "sugar cream oven", "oven egg flour", "cream sugar flour"),
    "stars": ("comet orbit moon", "orbit sun comet", "moon sun orbit", "sun comet moon"),
    "trees": ("leaf bark root", "bark branch leaf", "root branch bark", "branch leaf root"),
}
EXAMPLES = [
    Example(id="boats/0", task="boats", owners=("boats",), prompt=Prompt(text="mast hull sail rope")),
    Example(id="cakes/0", task="cakes", owners=("cakes",), prompt=Prompt(text="oven cream egg")),
    Example(id="stars/0", task="stars", owners=("stars",), prompt=Prompt(text="moon", system="comet orbit")),
    Example(id="both/0", task="both", owners=("boats", "trees"), prompt=Prompt(text="hull rope leaf bark root")),
    Example(id="empty/0", task="trees", owners=("trees",), prompt=Prompt(text="  ")),
    Example(id="nobody/0", task="nobody", prompt=Prompt(text="quartz zebra"), metric="none"),
]
OWNED = [example for example in EXAMPLES if example.owners]
#: Every method that needs nothing but registered experts.
FREE = [name for name in METHODS if name not in ("phatgoose", "meteora")]
MIX: dict[str, Any] = {"top_k": 3, "threshold": -1.0}


@pytest.fixture(scope="module")
def experts(adapters: list[Path]) -> list[Expert]:
    return known_experts(
        [
            Proposal(name=name, source=FolderSource(path=folder), samples=tuple(Sample(prompt=p) for p in prompts))
            for (name, prompts), folder in zip(WORDS.items(), adapters, strict=True)
        ]
    )


def entry(method: str, name: str | None = None, **settings: Any) -> RouterEntry:
    return RouterEntry(name=name or method, method=method, settings=settings)


def planned(
    routers: Sequence[RouterEntry], experts: Sequence[Expert], examples: Sequence[Example] = EXAMPLES, **options: Any
) -> list[Planned]:
    return list(plan(routers, experts, examples, **{"encoder": Remembering(WordsEncoder()), "max_rank": 64, **options}))


def of(found: Sequence[Planned], router: str, regime: str) -> dict[str, Planned]:
    return {each.example_id: each for each in found if (each.router, each.regime) == (router, regime)}


@pytest.fixture(scope="module")
def everything(experts: list[Expert]) -> list[Planned]:
    return planned([entry(method) for method in FREE], experts)


@pytest.fixture(params=FREE)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def asked(experts: Sequence[Expert], method: str, example: Example, allowed: Sequence[str] | None = None) -> Planned:
    """What a router says that serves these experts, freshly made."""
    router = Router(WordsEncoder(), RouterSettings(method=method, methods={method: {}}), max_rank=64)
    try:
        router.refresh(experts)
        body = example.prompt.body()
        decision = router.route_sync(example.prompt.routing_text(), allowed=allowed, limit=None)
    finally:
        router.close()
    assert body["messages"][-1]["content"] == example.prompt.text
    names = [each.expert for each in decision.candidates]
    rank = min((names.index(owner) + 1 for owner in example.owners if owner in names), default=0)
    return Planned("", "ood", 0, example.id, Recipe.of(decision), tuple(names[:5]), rank, decision.confidence)


def same(found: Planned, expected: Planned) -> None:
    assert replace(expected, router=found.router, regime=found.regime, route_ms=found.route_ms) == found


def test_in_distribution_is_what_a_server_s_router_decides(
    everything: list[Planned], experts: list[Expert], method: str
) -> None:
    found = of(everything, method, "in-distribution")
    assert list(found) == [example.id for example in EXAMPLES]
    for example in EXAMPLES:
        same(found[example.id], asked(experts, method, example))


def test_semi_ood_never_answers_with_an_owner(everything: list[Planned], experts: list[Expert], method: str) -> None:
    found = of(everything, method, "semi-ood")
    assert list(found) == [example.id for example in OWNED]
    for example in OWNED:
        others = [expert.name for expert in experts if expert.name not in example.owners]
        same(found[example.id], asked(experts, method, example, others))
        assert not {*example.owners} & {*found[example.id].recipe.names, *found[example.id].ranked}
        assert found[example.id].rank == 0


def test_out_of_distribution_is_a_router_that_never_knew_the_owners(
    everything: list[Planned], experts: list[Expert], method: str
) -> None:
    found = of(everything, method, "ood")
    assert list(found) == [example.id for example in OWNED]
    for example in OWNED:
        same(found[example.id], asked([e for e in experts if e.name not in example.owners], method, example))


def test_own_experts_are_found_and_the_best_ranked_of_several_counts(everything: list[Planned]) -> None:
    found = of(everything, "retrieval", "in-distribution")
    assert [found[each].recipe for each in ("boats/0", "cakes/0", "stars/0")] == [
        Recipe.expert(name) for name in ("boats", "cakes", "stars")
    ]
    assert [each.rank for each in found.values()] == [1, 1, 1, 1, 0, 0]
    assert found["both/0"].ranked[0] == "trees", "the second owner"
    assert found["nobody/0"].recipe == found["empty/0"].recipe == Recipe()
    assert found["empty/0"].confidence == 1


def test_rows_that_differ_in_how_experts_are_merged_share_decisions(
    experts: list[Expert], monkeypatch: pytest.MonkeyPatch
) -> None:
    routed: list[str] = []
    route = Routers.route

    def counted(self: Routers, way: Any, text: str, allowed: Sequence[str]) -> Any:
        routed.append(text)
        return route(self, way, text, allowed)

    monkeypatch.setattr(Routers, "route", counted)
    rows = [
        entry("retrieval", "cat", **MIX),
        entry("retrieval", "ties", **MIX, operator="ties", options={"density": 0.3}),
        entry("retrieval", "one member", operator="ties"),
    ]
    found = planned(rows, experts, regimes=("in-distribution",))
    assert len(routed) == 2 * len(EXAMPLES), "two ways to decide"
    plain, ties, alone = (of(found, name, "in-distribution") for name in ("cat", "ties", "one member"))
    blended = [key for key, each in plain.items() if each.recipe.kind == "blend"]
    assert len(blended) > 2
    for key in plain:
        expected = plain[key].recipe
        if key in blended:
            expected = expected.model_copy(update={"operator": "ties", "settings": {"density": 0.3}})
        assert replace(plain[key], router="ties", recipe=expected) == ties[key], "also the time it took"
        assert alone[key].recipe.kind in ("select", "base")
    direct = planned([rows[1]], experts, regimes=("in-distribution",))
    assert [each.recipe for each in direct] == [each.recipe for each in ties.values()]


def test_settings_of_one_method_do_not_mix(experts: list[Expert]) -> None:
    rows = [entry("retrieval", f"threshold {each}", threshold=each) for each in (-1.0, 0.2, 1.0)]
    found = planned(rows, experts)
    for row in rows:
        alone = planned([row], experts)
        assert [replace(each, route_ms=None) for each in found if each.router == row.name] == [
            replace(each, route_ms=None) for each in alone
        ]
    assert all(each.recipe == Recipe() for each in found if each.router == "threshold 1.0")


def test_what_was_decided_is_not_decided_again_and_keeps_its_time(
    experts: list[Expert], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [entry("retrieval"), entry("arrow"), entry("lexical", **MIX)]
    with Cache(None) as cache:
        first = planned(rows, experts, cache=cache)
        monkeypatch.setattr(Routers, "route", None)
        assert planned(rows, experts, cache=cache) == first


def test_a_run_that_was_cut_off_goes_on(experts: list[Expert]) -> None:
    rows = [entry("retrieval"), entry("lexical")]
    with Cache(None) as cache:
        options: dict[str, Any] = {"cache": cache, "encoder": Remembering(WordsEncoder()), "max_rank": 64}
        before = list(islice(plan(rows, experts, EXAMPLES, **options), 15))
        after = list(plan(rows, experts, EXAMPLES, **options))
    assert after[:15] == before
    assert len(after) == 2 * (len(EXAMPLES) + 2 * len(OWNED))


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "samples": lambda given: given.update(
        experts=[
            given["experts"][0].model_copy(update={"samples": (Sample(prompt="sugar"),)}),
            *given["experts"][1:],
        ]
    ),
    "weights": lambda given: given.update(
        experts=[given["experts"][0].model_copy(update={"digest": "f" * 64}), *given["experts"][1:]]
    ),
    "experts": lambda given: given.update(experts=given["experts"][1:]),
    "settings": lambda given: given.update(routers=[entry("arrow", shortlist=2)]),
    "engine": lambda given: given.update(max_rank=8),
    "prompt": lambda given: given.update(
        examples=[EXAMPLES[0].model_copy(update={"prompt": Prompt(text="bark sail")})]
    ),
    "owners": lambda given: given.update(examples=[EXAMPLES[0].model_copy(update={"owners": ("trees",)})]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_a_decision_depends_on_is_decided_again(
    experts: list[Expert], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"routers": [entry("arrow")], "experts": experts, "examples": EXAMPLES[:1], "max_rank": 64}
    with Cache(None) as cache:
        planned(**given, cache=cache, regimes=("in-distribution",))  # type: ignore[arg-type]
        CHANGES[change](given)
        routed: list[str] = []
        route = Routers.route

        def counted(self: Routers, way: Any, text: str, allowed: Sequence[str]) -> Any:
            routed.append(text)
            return route(self, way, text, allowed)

        monkeypatch.setattr(Routers, "route", counted)
        planned(**given, cache=cache, regimes=("in-distribution",))  # type: ignore[arg-type]
    assert len(routed) == 1


def test_a_text_is_encoded_once_and_charged_to_every_method_that_reads_it(
    experts: list[Expert], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = WordsEncoder()
    measured = Timed._measured
    monkeypatch.setattr(Timed, "_measured", lambda self, text: (measured(self, text)[0], 1e6))
    rows = [entry("retrieval"), entry("lda"), entry("retrieval", "strict", threshold=0.9), entry("random")]
    found = planned(rows, experts, encoder=Remembering(encoder))
    for each in found:
        assert each.route_ms is not None
        reads = each.router != "random" and each.example_id != "empty/0"
        assert (each.route_ms >= 1e6) == reads
    encoded = [text for batch in encoder.batches for text in batch]
    assert all(encoded.count(text) == 1 for prompts in WORDS.values() for text in prompts)
    texts = [example.prompt.routing_text() for example in EXAMPLES if example.prompt.text.strip()]
    assert [encoded.count(text) for text in texts[1:]] == [1] * len(texts[1:])
    assert encoded.count(texts[0]) == 1 + deciding.WARM_UP


def test_blends_and_models_are_for_all_prompts(experts: list[Expert]) -> None:
    rows = [
        RouterEntry(name="all", blend=Blend(operator="ties", settings={"density": 0.5})),
        RouterEntry(name="two", blend=Blend(experts={"boats": 0.7, "cakes": 0.3})),
        RouterEntry(name="auto", model="auto"),
    ]
    found = planned(rows, experts)
    names = sorted(WORDS)
    settings = {"density": 0.5}
    assert {each.recipe for each in of(found, "all", "in-distribution").values()} == {uniform(names, "ties", settings)}
    for regime in ("semi-ood", "ood"):
        left = of(found, "all", regime)
        assert left["boats/0"].recipe == uniform(names[1:], "ties", settings)
        assert left["both/0"].recipe == uniform(names[1:3], "ties", settings)
        assert of(found, "two", regime)["boats/0"].recipe.names == ("cakes",)
        assert of(found, "auto", regime) == {}
    served = of(found, "auto", "in-distribution")
    assert list(served) == [example.id for example in EXAMPLES]
    assert {each.recipe for each in served.values()} == {Recipe(kind="model", model="auto")}
    assert {each.route_ms for each in found} == {None}


def test_a_probe_that_no_request_can_ask_for_is_refused_at_once(experts: list[Expert]) -> None:
    assert planned([entry("probe", prior=False)], experts)
    for settings in ({"beta": 0.1}, {"blend": True}):
        with pytest.raises(NotAskable, match="a request for a probe says neither beta nor blend"):
            plan([entry("probe", **settings)], experts, EXAMPLES, encoder=Remembering(WordsEncoder()))


def test_without_experts_the_base_model_answers(experts: list[Expert], method: str) -> None:
    for some in ([], experts[:1]):
        found = planned([entry(method)], some, EXAMPLES[:1], regimes=("ood",))
        assert [(each.recipe, each.rank, each.ranked) for each in found] == [(Recipe(), 0, ())]


def test_seeds_regimes_and_progress(experts: list[Expert]) -> None:
    told: list[tuple[str, int, int]] = []
    found = planned(
        [entry("retrieval"), entry("lexical")],
        experts,
        regimes=("semi-ood",),
        seeds=(7, 8),
        tell=lambda *what: told.append(what),
    )
    assert {(each.regime, each.seed) for each in found} == {("semi-ood", 7)}
    assert len(found) == 2 * len(OWNED)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    assert told[-1][1:] == (2 * len(OWNED), 2 * len(OWNED))
    assert told[0][0] == "semi-ood: retrieval"


def test_examples_are_grouped_by_who_may_not_answer() -> None:
    assert grouped(EXAMPLES, "in-distribution") == [((), EXAMPLES)]
    twisted = EXAMPLES[3].model_copy(update={"id": "both/1", "owners": ("trees", "boats")})
    groups = dict(grouped([*EXAMPLES, twisted], "ood"))
    assert list(groups) == [("boats",), ("cakes",), ("stars",), ("boats", "trees"), ("trees",)]
    assert groups["boats", "trees"] == [EXAMPLES[3], twisted]


@pytest.fixture
def carded(adapter: Path) -> Path:
    (adapter / "README.md").write_text("# Sailing\n\nKnows the ropes.\n", encoding="utf-8")
    return adapter


def test_experts_are_known_as_a_server_would_register_them(carded: Path) -> None:
    (known,) = known_experts([Proposal(name="boats", source=FolderSource(path=carded))])
    assert (known.digest, known.rank, known.target_modules) == (content_digest(carded), 4, ("q_proj", "v_proj"))
    assert known.description == "Knows the ropes."
    (told,) = known_experts([Proposal(name="boats", source=FolderSource(path=carded), description="Boats.")])
    assert told.description == "Boats."


def test_what_is_on_the_hub_is_known_by_its_name_without_it() -> None:
    proposals = [Proposal(name=name, source=HubSource(repo=f"org/{name}")) for name in ("a", "b")]
    first, second = known_experts(proposals)
    assert (first.rank, first.samples) == (1, ())
    assert first.digest != second.digest
