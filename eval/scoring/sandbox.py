"""Programs that a model has written, run one at a time in a process that can do little.

Held back: time (CPU and clock), memory, files' size and number, processes and threads (none but its own), the
environment (empty), what it says (thrown away), the network and other processes (`unshare` of util-linux), files beside
its own temporary folder (Landlock). `unprotected` names what this machine cannot hold back. It is a seat belt against
mistakes, not a prison: a program that is written to break out, or to pretend that it passed, may. Whoever does not
trust the model runs the evaluation in a container or a virtual machine.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from eval.scoring import confine
from eval.scoring.metric import CannotScore


@dataclass(frozen=True)
class Limits:
    """seconds   of CPU time, so that a busy machine makes no program wrong; `clock` of real time, for those that sleep
    memory    bytes of address space
    """

    seconds: int = 5
    clock: float = 30.0
    memory: int = 2**30


def passes(program: str, limits: Limits = Limits()) -> bool:
    """Whether the program runs to its end without an error. Blocks for as long as it takes. Raises CannotScore."""
    return run(program, limits) == confine.DONE


def run(program: str, limits: Limits = Limits()) -> int | None:
    """Its exit code, DONE at its end, negative for a signal; None when time was up. Raises CannotScore."""
    if (wall := walls()) is None:
        raise CannotScore(unusable())
    return _run(program, limits, wall)


def unusable() -> str | None:
    """Why no program can be run on this machine; None where they can."""
    if walls() is not None:
        return None
    return (
        "pass@k cannot be measured here: programs of a model are run as an ordinary user, on Linux; as root only "
        "where util-linux's `setpriv` works"
    )


def _run(program: str, limits: Limits, wall: tuple[str, ...]) -> int | None:
    with tempfile.TemporaryDirectory(prefix="moerge-code-", ignore_cleanup_errors=True) as folder:
        path = Path(folder, "program.py")
        path.write_text(program, encoding="utf-8", errors="replace")
        # As `python -I`, and strings hash alike in every run, which -I would not let us say.
        python = [sys.executable, "-P", "-s", "-B", confine.__file__]
        process = subprocess.Popen(
            [*wall, *python, str(path), str(limits.seconds), str(limits.memory)],
            cwd=folder,
            env={"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "HOME": folder},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            return process.wait(limits.clock)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


#: Root's processes are not counted against a limit, but those of root whose real user is another one are.
_LESS_ROOT = ("setpriv", "--ruid", "65534", "--clear-groups")
_NO_RIGHTS = ("--bounding-set=-all",)
#: No network, no sight of other processes, and none of the program's own is left when the first of them ends.
_APART = ("unshare", "--user", "--map-root-user", "--net", "--ipc", "--pid", "--fork", "--kill-child=KILL")


def candidates() -> tuple[tuple[str, ...], ...]:
    """What may stand before the command, the best first."""
    return (_LESS_ROOT + _APART, _LESS_ROOT + _NO_RIGHTS) if os.geteuid() == 0 else (_APART, ())


@cache
def walls() -> tuple[str, ...] | None:
    """The first of them that works on this machine; None where none does."""
    for wall in candidates():
        there = all(shutil.which(each) for each in {"setpriv", "unshare"} & set(wall))
        if there and _run("", Limits(clock=60), wall) == confine.DONE:
            return wall
    return None


def unprotected() -> tuple[str, ...]:
    """What a program can do on this machine that it should not, in words."""
    wall, landlock = walls() or (), confine.landlock_version()
    apart = "unshare" in wall
    found = {
        "use the network": not apart and landlock < 4,
        "send data over UDP": not apart and landlock >= 4,
        "signal this user's other processes": not apart and landlock < 6,
        "read and write this user's files": not landlock,
    }
    return tuple(words for words, can in found.items() if can)
