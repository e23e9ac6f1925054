"""Which adapters are loaded: least recently used go, and never under a request."""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path

import pytest

from serving.engine import Adapter, AdapterLoadFailed, EngineUnavailable
from serving.residency import Residency


class Shelf:
    """An engine that loads and unloads when `steps` let it, and notices when it is asked for nonsense."""

    base_model = "tiny"

    def __init__(self, rng=None):
        self.on_it = set()
        self.busy = set()
        self.refuses = set()
        self.down = False
        self.most = 0
        self.unloads = []
        self.rng = rng or random.Random(0)

    async def _dawdle(self):
        for _ in range(self.rng.randrange(4)):
            await asyncio.sleep(0)

    async def load(self, adapter):
        assert adapter.name not in self.busy, "loaded while it is being unloaded"
        self.busy.add(adapter.name)
        try:
            await self._dawdle()
            if self.down:
                raise EngineUnavailable("down")
            if adapter.name in self.refuses:
                raise AdapterLoadFailed(adapter.shown, "no")
            self.on_it.add(adapter.name)
            self.most = max(self.most, len(self.on_it))
        finally:
            self.busy.discard(adapter.name)

    async def unload(self, name):
        assert name not in self.busy, "unloaded while it is being loaded"
        self.busy.add(name)
        try:
            await self._dawdle()
            self.on_it.discard(name)
            self.unloads.append(name)
        finally:
            self.busy.discard(name)

    def loaded(self):
        return frozenset(self.on_it)


def adapter(name):
    return Adapter(name=name, path=Path(name), shown=name, digest=f"digest of {name}")


async def use(residency, *names):
    for name in names:
        async with residency.lease(adapter(name)):
            pass


@pytest.fixture
def shelf():
    return Shelf()


async def test_an_adapter_is_loaded_once_and_stays(shelf):
    residency = Residency(shelf, 2)
    await use(residency, "a", "a", "a")
    assert shelf.on_it == {"a"}
    assert residency.loads == 1


async def test_the_least_recently_used_one_goes(shelf):
    residency = Residency(shelf, 2)
    await use(residency, "a", "b", "a", "c")
    assert shelf.on_it == {"a", "c"}
    assert shelf.unloads == ["b"]


async def test_there_are_never_more_than_the_limit_while_few_answer(shelf):
    residency = Residency(shelf, 3)
    await use(residency, *(f"e{k % 7}" for k in range(40)))
    assert shelf.most == 3


async def test_one_in_use_is_not_let_go(shelf):
    residency = Residency(shelf, 1)
    async with residency.lease(adapter("a")):
        async with residency.lease(adapter("b")):
            assert shelf.on_it == {"a", "b"}  # more than the limit, rather than an answer spoiled
        assert shelf.on_it == {"a"}
        await use(residency, "c")
        assert shelf.on_it == {"a"}
    await use(residency, "d")
    assert shelf.on_it == {"d"}


async def test_two_requests_share_one_load(shelf):
    residency = Residency(shelf, 2)
    await asyncio.gather(*(use(residency, "a") for _ in range(20)))
    assert residency.loads == 1


async def test_a_failed_load_leaves_nothing_behind(shelf):
    residency = Residency(shelf, 2)
    shelf.refuses.add("a")
    with pytest.raises(AdapterLoadFailed):
        await use(residency, "a")
    assert residency.digests() == frozenset()
    assert residency.loads == 0
    shelf.refuses.clear()
    await use(residency, "a")
    assert shelf.on_it == {"a"}


async def test_a_released_adapter_goes_at_once_when_idle(shelf):
    residency = Residency(shelf, 2)
    await use(residency, "a")
    await residency.release("a")
    assert shelf.on_it == set()
    assert residency.digests() == frozenset()


async def test_a_released_adapter_in_use_goes_with_its_last_request(shelf):
    residency = Residency(shelf, 2)
    async with residency.lease(adapter("a")):
        async with residency.lease(adapter("a")):
            await residency.release("a")
        assert shelf.on_it == {"a"}
        assert residency.digests() == {"digest of a"}
    assert shelf.on_it == set()


async def test_releasing_what_was_never_loaded_is_nothing(shelf):
    await Residency(shelf, 2).release("never")


async def test_a_request_that_is_cancelled_lets_go(shelf):
    residency = Residency(shelf, 1)
    entered = asyncio.Event()

    async def forever():
        async with residency.lease(adapter("a")):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(forever())
    await entered.wait()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await use(residency, "b")
    assert shelf.on_it == {"b"}


async def test_after_a_restart_adapters_are_loaded_again(shelf):
    residency = Residency(shelf, 2)
    await use(residency, "a", "b")
    shelf.on_it.clear()  # a new engine knows nothing
    async with residency.lease(adapter("a")):
        assert shelf.on_it == {"a"}


async def test_requests_while_the_engine_is_down_leave_no_trace(shelf):
    residency = Residency(shelf, 2)
    shelf.down = True
    with pytest.raises(EngineUnavailable):
        await use(residency, "a")
    shelf.down = False
    await use(residency, "b", "c", "d")
    assert shelf.on_it == {"c", "d"}


@pytest.mark.parametrize("seed", range(25))
async def test_whatever_happens_at_once_nobody_loses_an_adapter_in_use(seed):
    """Random traffic of leases, nested ones, failures, releases and cancellations, over a slow engine."""
    rng = random.Random(seed)
    shelf = Shelf(rng)
    limit = rng.randint(1, 6)
    residency = Residency(shelf, limit)
    names = [f"e{k}" for k in range(16)]
    shelf.refuses = set(rng.sample(names, 2))

    async def request():
        name = rng.choice(names)
        try:
            async with residency.lease(adapter(name)):
                for _ in range(rng.randrange(6)):
                    assert name in shelf.on_it, "lost under a request"
                    assert f"digest of {name}" in residency.digests()
                    await asyncio.sleep(0)
                if rng.random() < 0.1:
                    raise KeyError("the client's trouble")
        except (AdapterLoadFailed, KeyError):
            pass

    async def release():
        await asyncio.sleep(0)
        await residency.release(rng.choice(names))

    tasks = [asyncio.create_task(request() if rng.random() < 0.9 else release()) for _ in range(300)]
    for task in rng.sample(tasks, 20):
        asyncio.get_running_loop().call_soon(task.cancel)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(each) for each in results} <= {type(None), asyncio.CancelledError}

    shelf.refuses.clear()
    await use(residency, *names)  # and everything is in order afterwards
    assert shelf.on_it == set(names[-limit:])
    assert residency.digests() == {f"digest of {name}" for name in names[-limit:]}


async def test_16_experts_on_4_places_are_all_there_when_they_are_needed(shelf):
    residency = Residency(shelf, 4)
    rng = random.Random(1)

    async def ask(name):
        async with residency.lease(adapter(name)):
            for _ in range(rng.randrange(6)):
                assert name in shelf.on_it
                await asyncio.sleep(0)

    await asyncio.gather(*(ask(f"e{rng.randrange(16)}") for _ in range(400)))
    assert len(shelf.on_it) == 4
