"""The router: a prompt in, a decision out, over a library that can change at any time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from adapters_registry.expert import Expert
from router import library as libraries
from router.batching import MicroBatcher, Vector
from router.decision import Decision
from router.encoder import Encoder, Vectors, head_of
from router.errors import NotReady, RouterClosed, UnknownMethod
from router.library import Library, Mask
from router.method import Method, MethodSettings, Query, Standing, abstain, calibrated, decide, fitted, standing
from router.methods import METHODS, SERVED
from router.mixture import MixtureSettings
from router.text import BUDGET, shorten
from router.versions import NOTHING, Learned


class RouterSettings(BaseModel):
    """method      what plain `auto` uses; fusion, or where that is not among `methods` the first of them
    methods     served as `auto:<method>`, each with its settings; a server adds its own to these, null takes one out
    budget      characters of routing text that are read
    max_batch   prompts encoded together
    cache_size  encodings of recent prompts that are remembered
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = "fusion"
    methods: dict[str, dict[str, Any]] = {name: {} for name in SERVED}
    budget: int = Field(default=BUDGET, ge=16)
    max_batch: int = Field(default=32, ge=1)
    cache_size: int = Field(default=4096, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _first_method_by_default(cls, given: Any) -> Any:
        methods = given.get("methods") if isinstance(given, dict) else None
        if not isinstance(methods, dict) or not methods or "method" in given or "fusion" in methods:
            return given
        return {**given, "method": next(iter(methods))}

    @field_validator("methods")
    @classmethod
    def _known_methods_with_valid_settings(cls, methods: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, settings in methods.items():
            if name not in METHODS:
                raise ValueError(f"no routing method {name!r}; there are {', '.join(METHODS)}")
            METHODS[name].Settings.model_validate(settings)
        return methods

    @model_validator(mode="after")
    def _default_is_served(self) -> Self:
        if self.method not in self.methods:
            raise ValueError(f"the default method {self.method!r} is not among `methods`: {', '.join(self.methods)}")
        return self


@dataclass(frozen=True)
class Snapshot:
    """A library and every served method fitted to it; replaced as a whole."""

    library: Library
    methods: dict[str, Method] = field(default_factory=dict)


class Router:
    """Routes with the last complete snapshot while `refresh` builds the next one.

    `route` is for the event loop and never blocks it; `refresh` and `route_sync` block and are for threads
    (or a notebook).
    """

    def __init__(
        self, encoder: Encoder, settings: RouterSettings | None = None, *, max_rank: int | None = None
    ) -> None:
        """`max_rank`: rows of the largest composite that the engine takes, None for no limit."""
        self.settings = settings or RouterSettings()
        self._max_rank = max_rank
        self.encoder = encoder
        self._batcher = MicroBatcher(encoder, max_batch=self.settings.max_batch, cache_size=self.settings.cache_size)
        self._settings: dict[str, MethodSettings] = {
            name: METHODS[name].Settings.model_validate(given) for name, given in self.settings.methods.items()
        }
        # Its own threads: the event loop's may all be busy with downloads.
        self._deciders = ThreadPoolExecutor(max_workers=2, thread_name_prefix="moerge-router")
        self._snapshot: Snapshot | None = None
        self._building = threading.Lock()

    @property
    def encoder_id(self) -> str:
        """The key to store embeddings under: the encoder, and how much of a text it reads."""
        return f"{self.encoder.id}/{self.settings.budget}"

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods served, the default first."""
        return tuple(sorted(self._settings, key=lambda name: name != self.settings.method))

    def mixes(self, method: str) -> bool:
        """Whether this method lets several experts answer, blended."""
        settings = self._settings[method]
        return isinstance(settings, MixtureSettings) and settings.top_k > 1

    @property
    def library(self) -> Library | None:
        """The library being served; None before the first refresh."""
        return self._snapshot.library if self._snapshot else None

    @property
    def learned(self) -> Learned:
        """What is known beside the registry."""
        return self._snapshot.library.learned if self._snapshot else NOTHING

    def standing(self, method: str) -> Standing:
        """What this method's scores mean in the snapshot being served. Raises UnknownMethod, NotReady."""
        if method not in self._settings:
            raise UnknownMethod(method, known=self.methods)
        if (snapshot := self._snapshot) is None:
            raise NotReady
        return snapshot.library.once(("standing", method), lambda: standing(snapshot.methods[method], snapshot.library))

    async def vector(self, text: str) -> Vector:
        """(dim,) the embedding of a prompt as `route` reads it: remembered, when it has just been routed."""
        return await self._batcher.encode(self._read(text))

    def embed(self, texts: Sequence[str]) -> Vectors:
        """(n, dim) embeddings of texts read as prompts are, to store as prototypes; blocks."""
        return self._batcher.encode_all([self._read(text) for text in texts])

    def refresh(
        self,
        experts: Iterable[Expert],
        generation: int = 0,
        prototypes: Mapping[str, Vectors] | None = None,
        learned: Learned = NOTHING,
    ) -> Library:
        """Serve these experts from now on; blocks while new samples are encoded and the methods fitted.

        `prototypes`, by expert id, were stored under `encoder_id`: they are not computed again. `learned` is what the
        router knows beside the registry (`router.versions`).
        A generation older than the one being served changes nothing (two refreshes may overtake each other).
        """
        with self._building:
            old = self._snapshot
            if old and generation < old.library.generation:
                return old.library
            library = libraries.build(
                experts,
                self.embed,
                self.encoder.dim,
                generation=generation,
                max_rank=self._max_rank,
                stored=prototypes,
                previous=old.library if old else None,
                learned=learned,
                encoder=self.encoder_id,
                head=head_of(self.encoder),
            )
            methods = {
                name: calibrated(
                    fitted(METHODS[name], library, settings, old.methods[name] if old else None),
                    learned.calibration.get(name),
                    settings,
                    self.encoder_id,
                )
                for name, settings in self._settings.items()
            }
            self._snapshot = Snapshot(library, methods)
            return library

    async def route(
        self,
        text: str,
        *,
        method: str | None = None,
        tenant: str | None = None,
        allowed: Iterable[str] | None = None,
        limit: int | None = 5,
    ) -> Decision:
        """Decide which expert answers `text`, among those `tenant` can see and those `allowed` by name.

        Lists the `limit` best candidates, None lists all. Raises UnknownMethod, EncoderFailed, NotReady.
        """
        job = self._job(text, method, tenant, allowed, limit)
        vector = await self._batcher.encode(job.text) if job.reads_vector else None
        return await asyncio.get_running_loop().run_in_executor(self._deciders, job.finish, vector)

    def route_sync(
        self,
        text: str,
        *,
        method: str | None = None,
        tenant: str | None = None,
        allowed: Iterable[str] | None = None,
        limit: int | None = 5,
    ) -> Decision:
        """`route` for a notebook: blocks."""
        job = self._job(text, method, tenant, allowed, limit)
        vector = self._batcher.encode_all([job.text])[0] if job.reads_vector else None
        return job.finish(vector)

    def close(self) -> None:
        """Whoever waits gets RouterClosed."""
        self._batcher.close()
        self._deciders.shutdown(wait=False)

    def _job(
        self,
        text: str,
        method: str | None,
        tenant: str | None,
        allowed: Iterable[str] | None,
        limit: int | None,
    ) -> Job:
        if self._batcher.closed:
            raise RouterClosed
        name = self.settings.method if method is None else method
        if name not in self._settings:
            raise UnknownMethod(name, known=self.methods)
        if (snapshot := self._snapshot) is None:
            raise NotReady
        among = snapshot.library.visible(tenant, allowed)
        return Job(self._read(text), name, snapshot.methods[name], snapshot.library, among, limit)

    def _read(self, text: str) -> str:
        """What is read of a text: within the budget, and valid Unicode (JSON may hold half of a pair)."""
        return shorten(text.strip(), self.settings.budget).encode(errors="replace").decode()


@dataclass(frozen=True)
class Job:
    """One prompt on its way to a decision, with everything it needs of the snapshot it started on."""

    text: str
    name: str
    method: Method
    library: Library
    among: Mask
    limit: int | None
    started: float = field(default_factory=time.perf_counter)

    @property
    def reads_vector(self) -> bool:
        return self.method.encodes and bool(self.text)

    def finish(self, vector: Vector | None) -> Decision:
        encoded = time.perf_counter()
        if self.text:
            vector = np.zeros(self.library.dim, np.float32) if vector is None else vector
            query = Query(self.text, vector, self.among)
            decision = decide(self.name, self.method, self.library, query, self.limit)
        else:
            decision = abstain(self.name, self.library, "the request has no text")
        done = time.perf_counter()
        timings = {
            "encode": (encoded - self.started) * 1e3,
            "search": (done - encoded) * 1e3,
            "total": (done - self.started) * 1e3,
        }
        return decision.model_copy(update={"timings": timings})
