"""Work on all modules of a composite, in threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Results in order, from one thread for each core, each of which computes alone.

    Only a few results wait at any time: a composite may be larger than memory.
    """
    outside, workers = torch.get_num_threads(), os.cpu_count() or 1
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as threads:
            waiting: deque[Future[Result]] = deque()
            for item in items:
                waiting.append(threads.submit(function, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(outside)  # what a thread sets is also what threads to come begin with
