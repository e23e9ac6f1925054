"""Who does the work: processes of one core each, which end when their parent does."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from queue import Empty, Queue

# (what is worked on, steps done, steps in all, loss)
Report = Callable[[str, int, int, float], None]
Steps = Queue[tuple[str, int, int, float]]


@dataclass(frozen=True)
class Workers:
    """An executor, and the queue on which its jobs tell how far they are."""

    executor: Executor
    steps: Steps

    def finish(self, jobs: list[Future[None]], report: Report) -> None:
        """Passes progress on until all jobs are done; the first that fails ends the wait."""
        pending = set(jobs)
        while pending:
            done, pending = wait(pending, timeout=0.2)
            with contextlib.suppress(Empty):
                while True:
                    report(*self.steps.get_nowait())
            for job in done:
                job.result()


@contextlib.contextmanager
def processes(count: int) -> Iterator[Workers]:
    """Single-threaded processes. All have ended when the block has, also when it raises."""
    spawn = multiprocessing.get_context("spawn")
    with spawn.Manager() as manager:
        others = set(multiprocessing.active_children())
        executor = ProcessPoolExecutor(count, spawn, _start)
        try:
            yield Workers(executor, manager.Queue())
            executor.shutdown()
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
                child.join()
            raise


def _start() -> None:
    # Imported in the processes: the command line, which only starts them, shall be quick.
    import torch
    from transformers.utils import logging as transformers_logging

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
