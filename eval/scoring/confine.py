"""`python confine.py PROGRAM SECONDS BYTES`: limits this process, then runs the program; exit code DONE at its end.

Standard library only, nothing of Moerge: it runs by its path, in the sandbox's own Python process.
"""

from __future__ import annotations

import ctypes
import os
import resource
import runpy
import sys

#: The program came to its end; one that calls sys.exit before its tests did not.
DONE = 77
#: Largest file (bytes), open files, processes and threads.
FILE, FILES, PROCESSES = 16 * 2**20, 64, 1

# Landlock (man 7 landlock): system calls, rights on files, and by version of its interface which there are.
_CREATE, _ADD, _RESTRICT, _NO_NEW_PRIVILEGES = 444, 445, 446, 38
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_READ = _EXECUTE | _READ_FILE | _READ_DIR
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # how many; later versions have 16
_TCP, _SCOPES = 3, 3  # bind and connect (version 4); abstract sockets and signals (version 6)


class _Ruleset(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("files", "network", "scopes")]


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("rights", ctypes.c_uint64), ("folder", ctypes.c_int32)]


def landlock_version() -> int:
    """0 where the kernel has none."""
    if not sys.platform.startswith("linux"):
        return 0
    return max(int(_libc().syscall(_CREATE, None, 0, 1)), 0)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def limit(seconds: int, memory: int) -> None:
    limits = {
        "CPU": seconds,
        "AS": memory,
        "FSIZE": FILE,
        "NOFILE": FILES,
        "NPROC": PROCESSES,
        "CORE": 0,
    }
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def confine(folder: str) -> None:
    """Write only in `folder`; read only there, Python's own files and the system's; no TCP. As far as Landlock goes."""
    if not (version := landlock_version()):
        return
    libc = _libc()
    everything = (1 << _FILE_RIGHTS.get(version, 16)) - 1
    rules = _Ruleset(everything, _TCP if version >= 4 else 0, _SCOPES if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = libc.syscall(_CREATE, ctypes.byref(rules), size, 0)
    if ruleset < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    readable = {sys.prefix, sys.base_prefix, *sys.path, "/usr", "/lib", "/lib64", "/etc"}
    rights = {path: _READ for path in readable if os.path.isdir(path)}  # noqa: PTH112 - pathlib is slow to import
    rights |= {"/dev/null": _READ_FILE | _WRITE_FILE, folder: everything}
    for path, allowed in rights.items():
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if libc.syscall(_ADD, ruleset, 1, ctypes.byref(_Beneath(allowed, opened)), 0):
            raise OSError(ctypes.get_errno(), f"landlock_add_rule {path}")
        os.close(opened)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if libc.syscall(_RESTRICT, ruleset, 0):
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    os.close(ruleset)


if __name__ == "__main__":
    path, seconds, memory = sys.argv[1:]
    sys.argv = [path]
    confine(os.getcwd())  # noqa: PTH109
    limit(int(seconds), int(memory))
    runpy.run_path(path, run_name="__main__")
    os._exit(DONE)
