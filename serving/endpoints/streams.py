"""Long work told as server-sent events: `progress` (`{"stage", "fraction"}`), then its outcome or one `error`."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from serving.errors import error_response

logger = logging.getLogger("moerge")

T = TypeVar("T")

#: A stream says something at least this often (seconds), so that proxies keep it open.
HEARTBEAT = 10.0


class Told:
    """What a piece of work tells of its progress, from whichever thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    def progress(self, stage: str, fraction: float) -> None:
        event = {"stage": stage, "fraction": round(fraction, 4)}
        self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

    def stream(self, task: asyncio.Task[T], outcome: str, shown: Callable[[T], BaseModel]) -> StreamingResponse:
        """The stream of a task that was given `progress`; `outcome` names its last event."""
        task.add_done_callback(lambda _: self._queue.put_nowait(None))
        return StreamingResponse(self._events(task, outcome, shown), media_type="text/event-stream")

    async def _events(self, task: asyncio.Task[T], outcome: str, shown: Callable[[T], BaseModel]) -> AsyncIterator[str]:
        while True:
            try:
                event = await asyncio.wait_for(self._queue.get(), HEARTBEAT)
            except TimeoutError:
                yield ": still at it\n\n"
                continue
            if event is None:
                break
            yield f"event: progress\ndata: {json.dumps(event)}\n\n"
        if (error := task.exception()) is not None:
            assert isinstance(error, Exception)
            if (response := error_response(error)).status_code == 500:
                logger.error("What a stream told of failed", exc_info=error)
            yield f"event: error\ndata: {bytes(response.body).decode()}\n\n"
        else:
            yield f"event: {outcome}\ndata: {shown(task.result()).model_dump_json()}\n\n"
