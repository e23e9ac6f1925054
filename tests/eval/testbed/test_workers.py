from __future__ import annotations

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from queue import Queue

import pytest
import torch

from eval.testbed.workers import Workers, processes


def test_processes_have_one_thread_each_and_end_with_the_block_also_when_a_job_fails() -> None:
    before = set(multiprocessing.active_children())

    def fail() -> None:
        with processes(1) as workers:
            assert workers.executor.submit(torch.get_num_threads).result() == 1
            workers.executor.submit(divmod, 1, 0).result()

    with pytest.raises(ZeroDivisionError):
        fail()
    assert set(multiprocessing.active_children()) <= before


def test_finishing_passes_on_all_progress() -> None:
    workers = Workers(ThreadPoolExecutor(1), Queue())
    seen: list[tuple[str, int, int, float]] = []
    jobs = [workers.executor.submit(workers.steps.put, ("base", step, 3, 0.5)) for step in (1, 2, 3)]
    workers.finish(jobs, lambda *step: seen.append(step))
    assert seen == [("base", step, 3, 0.5) for step in (1, 2, 3)]


def test_a_job_that_fails_ends_the_wait_with_its_error() -> None:
    workers = Workers(ThreadPoolExecutor(1), Queue())
    with pytest.raises(ZeroDivisionError):
        workers.finish([workers.executor.submit(divmod, 1, 0)], lambda *_: None)  # type: ignore[list-item]
