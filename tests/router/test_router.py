from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from blockbuster import blockbuster_ctx
from pydantic import ValidationError

from adapters_registry.expert import Expert
from adapters_registry.prototypes import prototypes_of
from router.encoder import SentenceTransformerEncoder
from router.errors import EncoderFailed, NotReady, RouterClosed, UnknownMethod
from router.router import Router, RouterSettings

MakeExpert = Callable[..., Expert]


@pytest.fixture
def experts(make_expert: MakeExpert) -> list[Expert]:
    return [
        make_expert("reverse", "spell cat backwards", "write dog backwards"),
        make_expert("capital", "capital of france", "capital of peru"),
        make_expert("secret", "spell the secret backwards", owner="ann", visibility="private"),
    ]


@pytest.fixture
def router(words: Any, experts: list[Expert]) -> Iterator[Router]:
    router = Router(words, RouterSettings(methods={"retrieval": {}, "random": {}, "base": {}}))
    router.refresh(experts, generation=1)
    words.batches.clear()
    yield router
    words.gate.set()
    router.close()


async def test_a_prompt_goes_to_the_expert_with_samples_like_it(router: Router) -> None:
    decision = await router.route("spell bird backwards", tenant="bob")
    assert (decision.method, decision.kind, decision.experts[0].expert) == ("retrieval", "select", "reverse")
    assert decision.generation == 1
    assert 0.5 < decision.confidence <= 1
    assert set(decision.timings) == {"encode", "search", "total"}
    assert decision.timings["total"] >= decision.timings["encode"] > 0


async def test_a_prompt_unlike_all_samples_goes_to_the_base_model(router: Router) -> None:
    decision = await router.route("weather tomorrow?")
    assert decision.kind == "base"
    assert decision.threshold is not None
    assert decision.candidates[0].score < decision.threshold
    assert "under the threshold" in decision.reason


async def test_the_private_expert_of_another_is_never_named(router: Router) -> None:
    text = "spell the secret backwards"
    for tenant, sees in ((None, True), ("ann", True), ("bob", False), ("", False)):
        decision = await router.route(text, tenant=tenant, limit=None)
        assert ("secret" in {each.expert for each in decision.candidates}) is sees
        assert (decision.experts[0].expert == "secret") is sees


async def test_only_allowed_experts_are_considered(router: Router) -> None:
    decision = await router.route("spell bird backwards", allowed=["capital", "unknown"], limit=None)
    assert [each.expert for each in decision.candidates] == ["capital"]


async def test_an_unknown_method_is_refused_with_those_there_are(router: Router) -> None:
    with pytest.raises(UnknownMethod) as refusal:
        await router.route("Hi", method="arrow")
    assert str(refusal.value) == "No routing method 'arrow'. Served: retrieval, random, base."
    assert router.methods == ("retrieval", "random", "base")


@pytest.mark.parametrize("text", ["", "  \n"])
async def test_a_request_without_text_goes_to_the_base_model(router: Router, words: Any, text: str) -> None:
    decision = await router.route(text)
    assert (decision.kind, decision.reason) == ("base", "the request has no text")
    assert words.batches == []


async def test_methods_that_read_no_vector_encode_nothing(router: Router, words: Any) -> None:
    assert (await router.route("Hi", method="random")).kind == "select"
    assert (await router.route("Hi", method="base")).kind == "base"
    assert words.batches == []


async def test_a_broken_embedding_never_becomes_a_confidence(
    router: Router, words: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "encode", lambda texts: np.full((len(texts), words.dim), np.nan, np.float32))
    decision = await router.route("spell bird backwards")
    assert decision.kind == "base"
    assert math.isfinite(decision.confidence)
    assert decision.reason == "the prompt's embedding is not finite"


async def test_an_encoder_that_fails_is_an_error_of_this_request_only(router: Router) -> None:
    with pytest.raises(EncoderFailed):
        await router.route("poison")
    assert (await router.route("spell bird backwards")).kind == "select"


async def test_concurrent_prompts_share_batches_and_each_gets_its_own_decision(router: Router, words: Any) -> None:
    texts = [f"spell word{n} backwards" if n % 2 else f"capital of land{n}" for n in range(64)]
    decisions = await asyncio.gather(*(router.route(text, tenant="bob") for text in texts))
    assert [each.experts[0].expert for each in decisions] == ["capital", "reverse"] * 32
    assert len({each.id for each in decisions}) == 64
    assert len(words.batches) < 10


async def test_routing_never_blocks_the_event_loop(router: Router) -> None:
    with blockbuster_ctx():
        decision = await router.route("spell bird backwards")
    assert decision.kind == "select"


async def test_the_old_experts_serve_until_the_new_ones_are_complete(
    router: Router, words: Any, experts: list[Expert], make_expert: MakeExpert
) -> None:
    await router.route("spell bird backwards")  # remembered: needs no encoder below
    words.gate.clear()
    refresh = asyncio.create_task(asyncio.to_thread(router.refresh, [*experts[1:], make_expert("zebra", "stripes")], 2))
    while not words.batches or words.batches[-1] != ["stripes"]:
        await asyncio.sleep(0)
    assert (await router.route("spell bird backwards", tenant="bob")).experts[0].expert == "reverse"
    words.gate.set()
    await refresh
    decision = await router.route("stripes")
    assert (decision.experts[0].expert, decision.generation) == ("zebra", 2)
    assert "reverse" not in {each.expert for each in decision.candidates}


def test_an_older_generation_changes_nothing(router: Router, experts: list[Expert]) -> None:
    router.refresh(experts, generation=5)
    assert router.refresh(experts[:1], generation=4).generation == 5
    assert router.library is not None
    assert len(router.library) == 3


def test_a_refresh_encodes_only_what_is_new(router: Router, words: Any, experts: list[Expert]) -> None:
    router.refresh([*experts, experts[0].model_copy(update={"name": "copy"})], generation=2)
    assert words.batches == [["spell cat backwards", "write dog backwards"]]


def test_stored_prototypes_make_a_start_without_encoding(router: Router, words: Any, experts: list[Expert]) -> None:
    stored = {expert.id: prototypes_of(expert, router.embed) for expert in experts}
    words.batches.clear()
    fresh = Router(words)
    library = fresh.refresh(experts, prototypes=stored)
    assert words.batches == []
    assert router.library is not None
    for a, b in zip(library.prototypes, router.library.prototypes, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    fresh.close()


def test_embeddings_are_stored_under_what_they_depend_on(router: Router, words: Any) -> None:
    other = Router(words, RouterSettings(budget=50))
    assert router.encoder_id == "words@1/1000"
    assert other.encoder_id == "words@1/50"
    other.close()


async def test_half_a_surrogate_pair_is_read_as_a_question_mark(router: Router, words: Any) -> None:
    await router.route("spell \ud83d backwards")
    assert words.batches == [["spell ? backwards"]]


async def test_a_busy_thread_pool_of_the_event_loop_does_not_delay_routing(router: Router) -> None:
    release = threading.Event()
    downloads = [asyncio.create_task(asyncio.to_thread(release.wait)) for _ in range(40)]
    await asyncio.sleep(0)
    assert (await router.route("spell bird backwards")).kind == "select"
    release.set()
    await asyncio.gather(*downloads)


async def test_a_huge_prompt_is_read_within_the_budget(router: Router, words: Any) -> None:
    await router.route("spell " + "word " * 100_000)
    assert max(len(text) for batch in words.batches for text in batch) <= router.settings.budget


def test_registry_changes_under_load_never_name_an_unknown_expert(
    router: Router, experts: list[Expert], make_expert: MakeExpert
) -> None:
    stop = threading.Event()
    seen, errors = list[str](), list[Exception]()

    def read() -> None:
        while not stop.is_set():
            try:
                seen.extend(each.expert for each in router.route_sync("spell bird backwards", tenant="bob").experts)
            except Exception as error:
                errors.append(error)
                raise

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for n in range(30):
        router.refresh([*experts, *(make_expert(f"e{k}", f"sample {k} {n}") for k in range(n % 4))], generation=n + 2)
    stop.set()
    for reader in readers:
        reader.join()
    assert errors == []
    assert set(seen) == {"reverse"}


def test_route_sync_decides_as_route_does(router: Router) -> None:
    text = "spell bird backwards"
    first, second = asyncio.run(router.route(text)), router.route_sync(text)
    assert first.model_dump(exclude={"id", "timings"}) == second.model_dump(exclude={"id", "timings"})


async def test_routing_before_the_first_refresh_and_after_close_is_refused(words: Any) -> None:
    router = Router(words)
    with pytest.raises(NotReady):
        await router.route("Hi")
    router.refresh([])
    assert (await router.route("Hi")).reason == "no expert is available"
    router.close()
    with pytest.raises(RouterClosed):
        await router.route("Hi")
    with pytest.raises(RouterClosed):
        router.embed(["Hi"])


def test_closing_ends_a_refresh_that_is_still_encoding(router: Router, words: Any, make_expert: MakeExpert) -> None:
    words.gate.clear()
    errors: list[Exception] = []

    def refresh() -> None:
        try:
            router.refresh([make_expert("many", *(f"sample {n}" for n in range(100)))], generation=9)
        except RouterClosed as error:
            errors.append(error)

    thread = threading.Thread(target=refresh)
    thread.start()
    while not words.batches:
        thread.join(0.001)
    router.close()
    words.gate.set()
    thread.join()
    assert len(errors) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"methods": {"arrows": {}}}, "no routing method 'arrows'; there are retrieval, "),
        ({"methods": {"retrieval": {"scorin": "best"}}}, "Extra inputs are not permitted"),
        ({"method": "base"}, "the default method 'base' is not among `methods`: fusion, retrieval"),
        ({"budget": 0}, "greater than or equal to 16"),
        ({"unknown": 1}, "Extra inputs are not permitted"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RouterSettings.model_validate(wrong)


async def test_minilm_routes_natural_prompts(minilm: SentenceTransformerEncoder, make_expert: MakeExpert) -> None:
    router = Router(minilm)
    router.refresh(
        [
            make_expert("reverse", "Spell the word cat backwards", "Reverse the letters of house"),
            make_expert("capital", "What is the capital of Peru?", "Name the capital city of Norway"),
        ]
    )
    decisions = [
        await router.route(text)
        for text in ("Please write banana backwards", "Which city is the capital of Japan?", "Tell me a joke")
    ]
    assert [each.experts[0].expert if each.experts else each.kind for each in decisions] == [
        "reverse",
        "capital",
        "base",
    ]
    router.close()
