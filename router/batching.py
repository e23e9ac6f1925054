"""Micro-batching: requests that arrive while one batch is being encoded share the next one."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from statistics import median

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from router.encoder import Encoder, Vectors
from router.errors import EncoderFailed, RouterClosed

Vector = NDArray[np.float32]

ANY_TEXT = 32  # what encoding a text costs whatever its length, in characters
PACES = 8  # batches whose speed counts


class MicroBatcher:
    """One worker thread that owns an encoder, so that the event loop never waits for it.

    There is no fixed wait: an idle worker starts at once, a busy one takes what has arrived meanwhile, at most
    `max_batch` texts, and no more than it encodes in `max_delay` seconds at the speed of its last batches: on a CPU
    a text takes as long in a large batch as alone, and the first would wait for the last. Equal texts are encoded
    once; the last `cache_size` are remembered. `encode` is for one event loop at a time, `encode_all` for any thread
    outside it; both take their turn at the worker, so building a large library delays a request by one batch at most.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        max_batch: int = 32,
        max_delay: float = 0.03,
        cache_size: int = 4096,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._encoder = encoder
        self._max_batch = max_batch
        self._max_delay = max_delay
        self._clock = clock
        self._paces: deque[float] = deque(maxlen=PACES)  # seconds to a character
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="moerge-encoder")
        self._cache: LRUCache[str, Vector] = LRUCache(cache_size)
        self._waiting: dict[str, asyncio.Future[Vector]] = {}
        self._running: asyncio.Task[None] | None = None
        self.closed = False

    async def encode(self, text: str) -> Vector:
        """(dim,), read-only. Raises `EncoderFailed` if the encoder cannot read this text."""
        if self.closed:
            raise RouterClosed
        if (vector := self._cache.get(text)) is not None:
            return vector
        if (future := self._waiting.get(text)) is None:
            future = self._waiting[text] = asyncio.get_running_loop().create_future()
            future.add_done_callback(_retrieve)
            if self._running is None or self._running.done():
                self._running = asyncio.create_task(self._run())
        return await asyncio.shield(future)  # whoever is cancelled leaves alone; others may share the text

    def encode_all(self, texts: Sequence[str]) -> Vectors:
        """(n, dim), blocking; not cached. Never call it on the event loop."""
        if self.closed:
            raise RouterClosed
        vectors = np.zeros((len(texts), self._encoder.dim), np.float32)
        start = 0
        while start < len(texts):  # one batch at a time, so that requests come in between
            batch = self._cut(texts[start : start + self._max_batch])
            try:
                vectors[start : start + len(batch)] = self._worker.submit(self._call, batch).result()
            except (RuntimeError, CancelledError):  # shut down meanwhile
                raise RouterClosed from None
            start += len(batch)
        return vectors

    def close(self) -> None:
        """Whoever still waits gets `RouterClosed`; the running batch ends by itself."""
        self.closed = True
        self._worker.shutdown(wait=False, cancel_futures=True)
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            if not future.done():
                future.set_exception(RouterClosed())

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch = self._cut(self._waiting)
            for text, result in zip(batch, await loop.run_in_executor(self._worker, self._each, batch), strict=True):
                self._settle(text, result)

    def _cut(self, texts: Iterable[str]) -> list[str]:
        """The first texts, as many as a batch may hold; one at least."""
        pace = median(self._paces) if len(self._paces) == PACES else 0.0
        batch: list[str] = []
        cost = 0
        for text in texts:
            cost += ANY_TEXT + len(text)
            if batch and (len(batch) == self._max_batch or cost * pace > self._max_delay):
                break
            batch.append(text)
        return batch

    def _each(self, texts: list[str]) -> list[Vector | EncoderFailed]:
        """A result to each text: if the batch fails, one by one, so that one bad text fails nobody else."""
        try:
            return [vector.copy() for vector in self._call(texts)]  # copies: a view would keep its batch alive
        except EncoderFailed as error:
            return [error] if len(texts) == 1 else [self._each([text])[0] for text in texts]

    def _settle(self, text: str, result: Vector | EncoderFailed) -> None:
        future = self._waiting.pop(text, None)
        if isinstance(result, EncoderFailed):
            if future and not future.done():
                future.set_exception(result)
            return
        result.flags.writeable = False
        if self._cache.maxsize:
            self._cache[text] = result
        if future and not future.done():
            future.set_result(result)

    def _call(self, texts: Sequence[str]) -> Vectors:
        started = self._clock()
        try:
            vectors = self._encoder.encode(texts)
        except Exception as error:
            raise EncoderFailed(f"The encoder {self._encoder.id} failed: {error}") from error
        self._paces.append((self._clock() - started) / sum(ANY_TEXT + len(text) for text in texts))
        if vectors.shape != (len(texts), self._encoder.dim):
            raise EncoderFailed(
                f"The encoder {self._encoder.id} returned shape {vectors.shape} for {len(texts)} texts, "
                f"not ({len(texts)}, {self._encoder.dim})."
            )
        return vectors


def _retrieve(future: asyncio.Future[Vector]) -> None:
    """Mark the exception as seen: when every waiter was cancelled nobody else does."""
    if not future.cancelled():
        future.exception()
