"""What answers a suite: a server of its own, any OpenAI endpoint, or Transformers with PEFT in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters_registry.store import content_digest
from eval.asking import Engine, Tell
from eval.endpoint import Endpoint
from eval.served import engine_id, engine_settings, random_adapters, served
from eval.suite import Suite

if TYPE_CHECKING:
    from adapters_registry.expert import Expert


class Unsuitable(Exception):
    """An engine that does not have what the suite asks for."""


@dataclass(frozen=True)
class Chosen:
    """An engine that is opened when there is something to ask.

    random    digests of its adapters with random weights, by name; `folders`: where they are, if here
    resident  adapters that it keeps loaded
    max_rank  the largest that it takes; None: unknown
    about     for a reader of the run
    """

    id: str
    open: Callable[[], AbstractAsyncContextManager[Engine]]
    random: Mapping[str, str] = field(default_factory=dict)
    folders: Mapping[str, Path] = field(default_factory=dict)
    resident: int = 64
    max_rank: int | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


def own_server(suite: Suite, experts: Sequence[Expert], folder: Path, tell: Tell) -> Chosen:
    settings = engine_settings(suite)
    random = random_adapters(experts, folder / "random")

    @asynccontextmanager
    async def open_it() -> AsyncIterator[Engine]:
        async with served(suite, experts, random, folder, tell=tell, concurrency=suite.concurrency) as endpoint:
            yield endpoint

    return Chosen(
        id=engine_id(suite.base_model, settings, experts),
        open=open_it,
        random={name: content_digest(path) for name, path in random.items()},
        folders=random,
        resident=max(settings["resident"], settings["slots"]),
        max_rank=settings["max_rank"],
        about={"engine": "served", **settings},
    )


def in_process(suite: Suite, experts: Sequence[Expert], folder: Path) -> Chosen:
    from eval.local import Local

    random = random_adapters(experts, folder / "random")
    max_rank = engine_settings(suite)["max_rank"]
    engine = Local(
        suite.base_model,
        {each.name: each.path for each in experts} | random,
        samples={each.name: each.samples for each in experts},
        max_rank=max_rank,
    )

    @asynccontextmanager
    async def open_it() -> AsyncIterator[Engine]:
        try:
            yield engine
        finally:
            engine.close()

    return Chosen(
        id=engine.id,
        open=open_it,
        random={name: content_digest(path) for name, path in random.items()},
        folders=random,
        max_rank=max_rank,
        about={"engine": "peft"},
    )


async def somewhere(suite: Suite, experts: Sequence[Expert], url: str, api_key: str | None) -> Chosen:
    """Raises Unsuitable when the endpoint lacks something, or has something else under its name; EngineGone."""
    url = address(url)
    async with Endpoint(url, api_key, base=suite.base_model.name, retries=1) as endpoint:
        models = await endpoint.models()
        digests = await endpoint.digests()
    wanted = [suite.base_model.name, *(each.name for each in experts)]
    if missing := [name for name in wanted if name not in models]:
        raise Unsuitable(f"{url} does not serve {', '.join(missing)}. It serves: {', '.join(sorted(models))}.")
    other = [each.name for each in experts if digests.get(each.name, each.digest) != each.digest]
    if other:
        raise Unsuitable(
            f"{url} has other weights than the suite under these names: {', '.join(other)}. Register the suite's "
            "(`moerge expert add --new-version`), or correct the manifest."
        )

    @asynccontextmanager
    async def open_it() -> AsyncIterator[Engine]:
        async with Endpoint(url, api_key, base=suite.base_model.name, concurrency=suite.concurrency) as endpoint:
            yield endpoint

    random = {name: digests.get(name, "") for name in sorted(models) if name.startswith("random-weights-")}
    return Chosen(id=Endpoint(url, base=suite.base_model.name).id, open=open_it, random=random, about={"engine": url})


def address(url: str) -> str:
    """With `/v1` at its end, as OpenAI's client wants it."""
    url = url.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"
