"""Whom every row would have answer every prompt, in every regime: a server's decisions, made in this process.

    experts = known_experts(suite.experts, Hub())
    for planned in plan(suite.routers, experts, examples, cache=cache, encoder=encoder, max_rank=64):
        planned.recipe  # is what to ask for

Decisions are `router.router.Router`'s. Rows that differ in nothing but how experts are merged share them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters_registry.card import read_card
from adapters_registry.expert import Expert, State
from adapters_registry.hub import Hub
from adapters_registry.lora import CARD, CONFIG, KEPT
from adapters_registry.proposal import FolderSource, HubSource, Proposal, Source
from adapters_registry.prototypes import prototype_texts
from adapters_registry.store import content_digest
from eval.asking import Tell
from eval.cache import Cache
from eval.encodings import Remembering
from eval.examples import Example
from eval.recipe import Recipe
from eval.records import REGIMES, Regime
from router.adapter import Adapter
from router.decision import Decision, Verdict
from router.encoder import Vectors
from router.methods import METHODS
from router.mixture import MixtureSettings
from router.router import Router, RouterSettings

if TYPE_CHECKING:
    from eval.suite import RouterEntry

Names = tuple[str, ...]

RANKED = 5  # candidates that a record lists
WARM_UP = 3  # encodings before one is timed
CHUNK = 64  # decisions that go into the cache together


@dataclass(frozen=True)
class Planned:
    """One prompt under one row, in one regime: what to ask for. The fields are those of `eval.records.Record`.

    route_ms  the encoder's time for this text, alone, and the method's; None where nothing was decided here
    """

    router: str
    regime: Regime
    seed: int
    example_id: str
    recipe: Recipe
    ranked: Names = ()
    rank: int = 0
    confidence: float | None = None
    route_ms: float | None = None


class NotAskable(ValueError):
    """A row whose decisions cannot be said in a request."""


def plan(
    routers: Sequence[RouterEntry],
    experts: Sequence[Expert],
    examples: Sequence[Example],
    regimes: Sequence[Regime] = REGIMES,
    seeds: Sequence[int] = (0,),
    cache: Cache | None = None,
    tell: Tell = lambda what, done, total: None,
    *,
    encoder: Remembering,
    max_rank: int | None = None,
) -> Iterator[Planned]:
    """Every row's recipe for every example; `max_rank` is the engine's. Blocks: for a thread.

    Examples without owners are in-distribution alone. No method draws lots, so that all rows have the first seed.
    What is in the cache is not decided again, and keeps its time. Raises NotAskable before anything is decided.
    """
    ways = {entry.name: way_of(entry) for entry in routers if entry.method is not None}
    deciding = Deciding(experts, ways.values(), cache or Cache(None), encoder, max_rank)
    return _planned(routers, ways, deciding, examples, regimes, seeds[0], tell)


def _planned(
    routers: Sequence[RouterEntry],
    ways: dict[str, Way],
    deciding: Deciding,
    examples: Sequence[Example],
    regimes: Sequence[Regime],
    seed: int,
    tell: Tell,
) -> Iterator[Planned]:
    groups = [(regime, *group) for regime in regimes for group in grouped(examples, regime)]
    total, done = len(deciding.ways) * sum(len(some) for *_, some in groups), 0
    try:
        for regime, owners, some in groups:
            allowed = [name for name in deciding.names if name not in owners]
            found: dict[Way, list[Planned]] = {}
            for way in deciding.ways:
                tell(f"{regime}: {way.method}", done, total)
                found[way] = deciding.decided(way, regime, owners, some)
                done += len(some)
            for entry in routers:
                if entry.method is not None:
                    for each in found[ways[entry.name]]:
                        yield replace(each, router=entry.name, seed=seed, recipe=merged(each.recipe, entry.settings))
                elif entry.blend is not None or regime == "in-distribution":
                    fixed = entry.blend.recipe(allowed) if entry.blend else Recipe(kind="model", model=entry.model)
                    yield from (Planned(entry.name, regime, seed, example.id, fixed) for example in some)
        tell("", total, total)
    finally:
        deciding.close()


def grouped(examples: Sequence[Example], regime: Regime) -> list[tuple[Names, list[Example]]]:
    """The examples of a regime, by the experts that may not answer them there."""
    if regime == "in-distribution":
        return [((), list(examples))]
    groups: dict[Names, list[Example]] = {}
    for example in examples:
        if example.owners:
            groups.setdefault(tuple(sorted(set(example.owners))), []).append(example)
    return list(groups.items())


# How a row decides


@dataclass(frozen=True)
class Way:
    """A method with the settings (JSON) that say who answers; how several experts are merged is left out."""

    method: str
    settings: str


def way_of(entry: RouterEntry) -> Way:
    """Raises NotAskable."""
    assert entry.method is not None
    settings = METHODS[entry.method].Settings.model_validate(entry.settings)
    told = settings.model_dump(mode="json")
    if entry.method == "probe" and Verdict(beta=told["beta"], blend=told["blend"]) != Verdict():
        raise NotAskable(
            f"{entry.name}: a request for a probe says neither beta nor blend. Leave them as they are "
            f"({Verdict().beta:g}, no blend), or serve this probe and evaluate its `model: auto:probe`."
        )
    if isinstance(settings, MixtureSettings):
        told |= {"operator": "cat", "options": {}}
    return Way(entry.method, json.dumps(told, sort_keys=True))


def merged(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """What a way decided, merged as a row's settings say."""
    if recipe.kind != "blend":
        return recipe
    return Recipe.blend(dict(recipe.experts), settings.get("operator", "cat"), settings.get("options"))


class Timed:
    """An encoder that charges for every text that is routed what encoding it took, alone and anew, the first time."""

    def __init__(self, encoder: Remembering) -> None:
        self._encoder = encoder
        self._known: dict[str, tuple[Vectors, float]] = {}
        self.id, self.dim, self.head = encoder.id, encoder.dim, encoder.head
        self.routing = False
        self.charged = 0.0  # milliseconds

    def encode(self, texts: Sequence[str]) -> Vectors:
        if not self.routing:
            return self._encoder.encode(texts)
        (text,) = texts
        if text not in self._known:
            self._known[text] = self._measured(text)
        vector, took = self._known[text]
        self.charged += took
        return vector

    def _measured(self, text: str) -> tuple[Vectors, float]:
        with self._encoder.fresh():
            for _ in range(0 if self._known else WARM_UP):
                self._encoder.encode([text])
            started = time.perf_counter()
            vector = self._encoder.encode([text])
            return vector, (time.perf_counter() - started) * 1e3


class Routers:
    """Routers fitted to one library, each when it is asked first. One router has one setting of a method."""

    def __init__(self, ways: Sequence[Way], experts: Sequence[Expert], encoder: Timed, max_rank: int | None) -> None:
        self._experts = experts
        self._encoder = encoder
        self._max_rank = max_rank
        self._sets: list[dict[str, Way]] = []
        for way in ways:
            free = next((each for each in self._sets if way.method not in each), None)
            if free is None:
                self._sets.append(free := {})
            free[way.method] = way
        self._made: dict[int, Router] = {}

    def route(self, way: Way, text: str, allowed: Sequence[str]) -> tuple[Decision, float]:
        """The decision, with all candidates, and the milliseconds it takes."""
        router = self._router(next(n for n, each in enumerate(self._sets) if each.get(way.method) == way))
        self._encoder.routing, self._encoder.charged = True, 0.0
        decision = router.route_sync(text, method=way.method, allowed=allowed, limit=None)
        self._encoder.routing = False
        return decision, decision.timings["search"] + self._encoder.charged

    def _router(self, number: int) -> Router:
        if number not in self._made:
            methods = {way.method: json.loads(way.settings) for way in self._sets[number].values()}
            settings = RouterSettings(method=next(iter(methods)), methods=methods)
            self._made[number] = Router(self._encoder, settings, max_rank=self._max_rank)
            self._made[number].refresh(self._experts)
        return self._made[number]

    def close(self) -> None:
        for router in self._made.values():
            router.close()


class Deciding:
    """Decides, with routers for the library that it needs: one library at a time."""

    def __init__(
        self,
        experts: Sequence[Expert],
        ways: Iterable[Way],
        cache: Cache,
        encoder: Remembering,
        max_rank: int | None,
    ) -> None:
        self.ways = tuple(dict.fromkeys(ways))
        self.names = sorted(expert.name for expert in experts)
        self._experts = experts
        self._cache = cache
        self._encoder = encoder
        self._max_rank = max_rank
        self._library: tuple[Names, Routers] | None = None
        texts = {each.name: (each.id, each.rank, prototype_texts(each)) for each in experts}
        self._common = [version("moerge"), encoder.id, max_rank, texts]

    @cached_property
    def _timed(self) -> Timed:
        return Timed(self._encoder)

    def decided(self, way: Way, regime: Regime, owners: Names, examples: Sequence[Example]) -> list[Planned]:
        """In the order of the examples, which all have these owners; in-distribution they do not matter."""
        gone = owners if regime == "ood" else ()
        allowed = [name for name in self.names if name not in owners]
        start = _digest([*self._common, way.method, way.settings, gone, allowed])
        keys = [f"decision/{_digest([start, each.owners, each.prompt.routing_text()])}" for each in examples]
        known = self._cache.get_many(keys)
        for first in range(0, len(examples), CHUNK):
            new: dict[str, Any] = {}
            for key, example in zip(keys[first : first + CHUNK], examples[first : first + CHUNK], strict=True):
                if key not in known and key not in new:
                    new[key] = told(*self._routers(gone).route(way, example.prompt.routing_text(), allowed), example)
            self._cache.put_many(new)
            known |= new
        return [
            Planned(way.method, regime, 0, example.id, **read(known[key]))
            for key, example in zip(keys, examples, strict=True)
        ]

    def _routers(self, gone: Names) -> Routers:
        """Those that have never heard of some experts."""
        if self._library is None or self._library[0] != gone:
            self.close()
            left = [expert for expert in self._experts if expert.name not in gone]
            self._library = (gone, Routers(self.ways, left, self._timed, self._max_rank))
        return self._library[1]

    def close(self) -> None:
        if self._library is not None:
            self._library[1].close()
            self._library = None


def told(decision: Decision, route_ms: float, example: Example) -> dict[str, Any]:
    """A decision as it is kept in the cache; `rank` is the best of the example's owners'."""
    names = [candidate.expert for candidate in decision.candidates]
    places = [names.index(owner) + 1 for owner in example.owners if owner in names]
    return {
        "recipe": Recipe.of(decision).model_dump(mode="json", exclude_defaults=True),
        "ranked": names[:RANKED],
        "rank": min(places, default=0),
        "confidence": decision.confidence,
        "route_ms": route_ms,
    }


def read(kept: dict[str, Any]) -> dict[str, Any]:
    return kept | {"recipe": Recipe.model_validate(kept["recipe"]), "ranked": tuple(kept["ranked"])}


def _digest(told: Any) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode(errors="surrogatepass")).hexdigest()


# Who there is


def known_experts(proposals: Sequence[Proposal], hub: Hub | None = None) -> list[Expert]:
    """The experts that a server has after registering these: content, rank, samples.

    With a `hub`, what is there is fetched into the Hub's cache; without one, and for uploads, the rank is taken for 1.
    Raises SourceError; OSError, ValueError or SafetensorError for what is no adapter.
    """
    return [_expert(proposal, _folder(proposal.source, hub)) for proposal in proposals]


def _folder(source: Source, hub: Hub | None) -> Path | None:
    if isinstance(source, FolderSource):
        return source.path
    if hub is None or not isinstance(source, HubSource):
        return None
    snapshot = hub.resolve(source)
    files = {name: hub.download(snapshot, name, lambda share: None) for name in KEPT if name in snapshot.sizes}
    return files[CONFIG].parent


def _expert(proposal: Proposal, folder: Path | None) -> Expert:
    digest = hashlib.sha256(str(proposal.source).encode()).hexdigest()
    rank, modules, described = 1, list[str](), ""
    if folder is not None:
        adapter = Adapter(folder)
        digest, modules, described = content_digest(folder), adapter.modules, read_card(folder / CARD).description
        rank = max(map(adapter.rank, modules), default=adapter.config.r)
    return Expert(
        name=proposal.name,
        version=1,
        digest=digest,
        state=State.ACTIVE,
        path=folder or Path(proposal.name),
        base_model="",
        rank=rank,
        target_modules=tuple(sorted({module.rpartition(".")[2] for module in modules})),
        source=proposal.source.kind,
        description=described if proposal.description is None else proposal.description,
        samples=proposal.samples,
    )
