from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from blockbuster import blockbuster_ctx

from router.batching import MicroBatcher
from router.encoder import Vectors
from router.errors import EncoderFailed, RouterClosed


@pytest.fixture
def batcher(words: Any) -> Iterator[MicroBatcher]:
    batcher = MicroBatcher(words, max_batch=4, clock=lambda: 0.0)  # the gate is no measure of speed
    yield batcher
    words.gate.set()
    batcher.close()


async def waiting(batcher: MicroBatcher, words: Any, texts: Sequence[str]) -> list[asyncio.Task[Any]]:
    """Tasks for `texts`, queued up behind a batch that does not end before the gate opens."""
    words.gate.clear()
    first = asyncio.create_task(batcher.encode("first"))
    while not words.batches:
        await asyncio.sleep(0)
    tasks = [asyncio.create_task(batcher.encode(text)) for text in texts]
    await asyncio.sleep(0)  # every task runs up to its wait
    return [first, *tasks]


async def test_each_caller_gets_the_vector_of_its_own_text(batcher: MicroBatcher, words: Any) -> None:
    texts = [f"text {n}" for n in range(11)]
    vectors = await asyncio.gather(*map(batcher.encode, texts))
    np.testing.assert_array_equal(vectors, words.encode(texts))


async def test_what_arrives_during_a_batch_shares_the_next_ones(batcher: MicroBatcher, words: Any) -> None:
    tasks = await waiting(batcher, words, ["a", "b", "c", "d", "e"])
    words.gate.set()
    await asyncio.gather(*tasks)
    assert words.batches == [["first"], ["a", "b", "c", "d"], ["e"]]


async def test_equal_texts_are_encoded_once_and_remembered(batcher: MicroBatcher, words: Any) -> None:
    tasks = await waiting(batcher, words, ["a", "a", "a"])
    words.gate.set()
    await asyncio.gather(*tasks)
    await batcher.encode("a")
    assert words.batches == [["first"], ["a"]]


async def test_a_remembered_vector_cannot_be_changed_by_a_caller(batcher: MicroBatcher) -> None:
    vector = await batcher.encode("a")
    with pytest.raises(ValueError, match="read-only"):
        vector[0] = 7


async def test_the_oldest_encodings_are_forgotten(words: Any) -> None:
    batcher = MicroBatcher(words, cache_size=1)
    for text in ["a", "b", "a"]:
        await batcher.encode(text)
    assert words.batches == [["a"], ["b"], ["a"]]
    batcher.close()


async def test_nothing_is_remembered_with_a_cache_of_no_size(words: Any) -> None:
    batcher = MicroBatcher(words, cache_size=0)
    first, second = await batcher.encode("a"), await batcher.encode("a")
    np.testing.assert_array_equal(first, second)
    assert len(words.batches) == 2
    batcher.close()


async def test_cancelling_one_waiter_leaves_the_others(batcher: MicroBatcher, words: Any) -> None:
    _, a, same_as_a, b = await waiting(batcher, words, ["a", "a", "b"])
    a.cancel()
    words.gate.set()
    results = await asyncio.gather(a, same_as_a, b, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    np.testing.assert_array_equal(results[1:], words.encode(["a", "b"]))


async def test_cancelling_whoever_runs_leaves_the_others(batcher: MicroBatcher, words: Any) -> None:
    first, a = await waiting(batcher, words, ["a"])
    first.cancel()
    words.gate.set()
    np.testing.assert_array_equal(await a, words.encode(["a"])[0])


async def test_a_text_that_the_encoder_cannot_read_fails_nobody_else(batcher: MicroBatcher, words: Any) -> None:
    tasks = await waiting(batcher, words, ["a", "poison", "b", "c", "d"])
    words.gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    failed = [isinstance(result, EncoderFailed) for result in results]
    assert failed == [False, False, True, False, False, False]
    assert str(results[2]) == "The encoder words@1 failed: cannot read this"
    assert isinstance(results[2].__cause__, ValueError)
    assert (await batcher.encode("a")).shape == (words.dim,)


async def test_a_failure_that_nobody_waits_for_any_more_is_silent(batcher: MicroBatcher, words: Any) -> None:
    first, poison = await waiting(batcher, words, ["poison"])
    poison.cancel()
    words.gate.set()
    await first
    assert (await batcher.encode("a")).shape == (words.dim,)


async def test_an_encoder_that_returns_another_shape_is_named(words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "encode", lambda texts: np.zeros((3, 5), np.float32))
    batcher = MicroBatcher(words)
    with pytest.raises(EncoderFailed, match=r"words@1 returned shape \(3, 5\) for 1 texts, not \(1, 32\)"):
        await batcher.encode("a")
    batcher.close()


async def test_closing_releases_whoever_waits_and_refuses_the_next(batcher: MicroBatcher, words: Any) -> None:
    tasks = await waiting(batcher, words, ["a"])
    batcher.close()
    words.gate.set()
    for task in tasks:
        with pytest.raises(RouterClosed):
            await task
    with pytest.raises(RouterClosed):
        await batcher.encode("b")
    with pytest.raises(RouterClosed):
        batcher.encode_all(["b"])


async def test_the_event_loop_is_free_while_a_batch_runs(batcher: MicroBatcher, words: Any) -> None:
    with blockbuster_ctx():
        tasks = await waiting(batcher, words, ["a"])
        assert not tasks[0].done()
        words.gate.set()
        await asyncio.gather(*tasks)


def test_encoding_many_goes_in_batches_and_keeps_the_order(batcher: MicroBatcher, words: Any) -> None:
    texts = [f"text {n}" for n in range(10)]
    vectors = batcher.encode_all(texts)
    assert [len(batch) for batch in words.batches] == [4, 4, 2]
    np.testing.assert_array_equal(vectors, words.encode(texts))
    assert batcher.encode_all([]).shape == (0, words.dim)


async def test_a_request_comes_in_between_the_batches_of_a_large_job(batcher: MicroBatcher, words: Any) -> None:
    words.gate.clear()
    job = asyncio.create_task(asyncio.to_thread(batcher.encode_all, [f"text {n}" for n in range(12)]))
    while not words.batches:
        await asyncio.sleep(0)
    request = asyncio.create_task(batcher.encode("request"))
    for _ in range(3):  # the caller, then the task that it starts, up to handing the batch over
        await asyncio.sleep(0)
    words.gate.set()
    await asyncio.gather(job, request)
    assert words.batches[1] == ["request"]


class Clock:
    """Time passes only while an encoder encodes: a millisecond to each text."""

    def __init__(self, words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self._encode = words.encode
        monkeypatch.setattr(words, "encode", self.encode)

    def encode(self, texts: Sequence[str]) -> Vectors:
        self.now += len(texts) / 1000
        return self._encode(texts)

    def __call__(self) -> float:
        return self.now


def test_a_batch_ends_where_it_would_take_too_long(words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = MicroBatcher(words, max_batch=16, max_delay=0.0055, clock=Clock(words, monkeypatch))
    batcher.encode_all([f"{n:03}" for n in range(8 * 16)])  # learns its speed
    words.batches.clear()
    batcher.encode_all([f"{n:03}" for n in range(12)])
    assert [len(batch) for batch in words.batches] == [5, 5, 2]
    words.batches.clear()
    batcher.encode_all(["long " * 1000, "and", "two"])
    assert [len(batch) for batch in words.batches] == [1, 2]
    batcher.close()


async def test_requests_are_cut_into_batches_like_a_large_job(words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batcher = MicroBatcher(words, max_batch=16, max_delay=0.0055, clock=Clock(words, monkeypatch))
    await asyncio.to_thread(batcher.encode_all, [f"{n:03}" for n in range(8 * 16)])
    words.batches.clear()
    tasks = await waiting(batcher, words, [f"{n:03}" for n in range(12)])
    words.gate.set()
    await asyncio.gather(*tasks)
    assert [len(batch) for batch in words.batches] == [1, 5, 5, 2]
    batcher.close()


async def test_a_batcher_serves_a_second_event_loop_after_the_first(batcher: MicroBatcher) -> None:
    results: list[Vectors] = []
    thread = threading.Thread(target=lambda: results.append(asyncio.run(batcher.encode("a"))))
    thread.start()
    await asyncio.to_thread(thread.join)
    np.testing.assert_array_equal(await batcher.encode("a"), results[0])
    assert (await batcher.encode("b")).shape == results[0].shape
