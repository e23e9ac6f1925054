"""Runs a command for as long as whoever started it lives: `python -m eval.warden [--grace SECONDS] COMMAND ...`.

Its stdin is a pipe. When that closes, by intent or because its other end was killed, the command is interrupted, and
whatever is left of it and its children is killed: a server does not outlive a kill -9 of the process that needs it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

GRACE = 30.0  # seconds between being interrupted and being killed


def main(argv: list[str]) -> None:
    grace = GRACE
    if argv[:1] == ["--grace"]:
        grace, argv = float(argv[1]), argv[2:]
    child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, process_group=0)
    threading.Thread(target=_watch, args=(child, grace), daemon=True).start()
    code = child.wait()
    _kill_group(child.pid)
    sys.exit(code if code >= 0 else 128 - code)


def _watch(child: subprocess.Popen[bytes], grace: float) -> None:
    while os.read(0, 4096):
        pass
    child.send_signal(signal.SIGINT)
    time.sleep(grace)
    _kill_group(child.pid)


def _kill_group(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
