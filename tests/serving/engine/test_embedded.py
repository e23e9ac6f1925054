"""Traces on their way out of an engine, without an engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from serving.config import EngineSettings
from serving.engine import EngineUnavailable, Trace
from serving.engine.embedded import EmbeddedVllm
from serving.engine.private import TRACE_METHOD
from serving.engine.transport import pack


class Client:
    """Two workers; each has what the other has."""

    def __init__(self, trace: Trace | None) -> None:
        self.trace = trace

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[tuple[str, bytes] | None]:
        assert (method, args) == (TRACE_METHOD, ("key",))
        if self.trace is None:
            return [None, None]
        return [pack(self.trace), pack(self.trace)]


@pytest.fixture
def engine() -> EmbeddedVllm:
    return EmbeddedVllm(EngineSettings(), model="base", served_name="base")


async def test_a_trace_is_fetched_from_the_first_worker(engine):
    engine._client = Client(Trace(("a",), 2, np.ones((1, 2)), np.arange(2), np.zeros(2), {}))
    assert (await engine.trace("key")).tokens == 2


async def test_a_key_that_no_request_had_has_no_trace(engine):
    engine._client = Client(None)
    assert await engine.trace("key") is None


async def test_an_engine_that_is_not_up_has_no_traces(engine):
    with pytest.raises(EngineUnavailable):
        await engine.trace("key")


async def test_an_engine_that_dies_meanwhile_is_unavailable(engine):
    engine._client = object()
    with pytest.raises(EngineUnavailable, match="stopped"):
        await engine.trace("key")
