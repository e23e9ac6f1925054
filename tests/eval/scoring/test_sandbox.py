"""What a program can do in the sandbox, and what it cannot. Real processes; no timing is asserted."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from eval.scoring import CannotScore, confine, sandbox
from eval.scoring.code import refused
from eval.scoring.confine import DONE
from eval.scoring.sandbox import Limits, passes, run, unprotected


@pytest.fixture(autouse=True)
def works() -> None:
    if (why := sandbox.unusable()) is not None:
        pytest.skip(why)


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("assert 1 + 1 == 2", DONE),
        ("import asyncio, json, heapq, re, zoneinfo", DONE),
        ("import numpy as np\nassert (np.ones((9, 9)) @ np.ones(9)).sum() == 81", DONE),
        ("assert 1 + 1 == 3", 1),
        ("this is no Python", 1),
        ("raise SystemExit(3)", 3),
        ("import os\nos._exit(0)", 0),
    ],
)
def test_exit_codes(program, code):
    assert run(program) == code
    assert passes(program) == (code == DONE)


def test_a_program_that_never_ends_is_stopped():
    assert not passes("while True: pass", Limits(seconds=1))


def test_a_program_that_only_waits_is_stopped():
    assert run("import time\ntime.sleep(1e6)", Limits(clock=1)) is None


def test_a_program_that_ignores_signals_is_stopped():
    deaf = "import signal\nfor each in (2, 15, 24): signal.signal(each, signal.SIG_IGN)\nwhile True: pass"
    assert not passes(deaf, Limits(seconds=1))


@pytest.mark.parametrize(
    ("start", "error"),
    [
        ("os.fork()", "BlockingIOError"),
        ("subprocess.run([sys.executable, '-c', ''])", "BlockingIOError"),
        ("threading.Thread(target=print).start()", "RuntimeError"),
    ],
)
def test_a_program_starts_no_others(start, error):
    refused = f"import os, subprocess, sys, threading\ntry:\n    {start}\nexcept {error}: pass\nelse: sys.exit(1)"
    assert run(refused) == DONE


def test_a_fork_bomb_does_not_go_off():
    assert not passes("import os\nwhile True: os.fork()")


def test_memory_is_limited():
    assert run("try:\n    bytearray(2 ** 31)\nexcept MemoryError: pass\nelse: raise SystemExit(1)") == DONE


def test_files_are_limited_in_size():
    large = "try:\n    with open('x', 'wb') as f:\n        while True: f.write(bytes(2 ** 20))\n"
    assert run(f"{large}except OSError as error: assert error.errno == 27, error") == DONE  # EFBIG


def test_whatever_it_says_is_thrown_away(capfd):
    assert passes("import sys\nfor _ in range(1000): print('x' * 10000); print('y' * 10000, file=sys.stderr)")
    assert capfd.readouterr() == ("", "")


def test_it_learns_nothing_of_the_environment(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    assert passes("import os, sys\nassert 'secret' not in os.environ.values()\nassert '/somewhere' not in sys.path")


def test_it_works_in_a_folder_of_its_own_that_goes_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert passes("import os\nassert os.listdir() == ['program.py']\nopen('left', 'w').write('here')")
    assert list(tmp_path.iterdir()) == []


def test_strings_hash_alike_in_every_run():
    order = "assert list({'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'}) == "
    orders = {passes(f"{order}{sorted('abcdefgh')!r}") for _ in range(3)}
    assert len(orders) == 1


def test_files_elsewhere_are_out_of_its_reach(tmp_path):
    if "read and write this user's files" in unprotected():
        pytest.skip("this kernel has no Landlock")
    (tmp_path / "answers").write_text("42")
    tmp_path.chmod(0o777)
    for attempt in (f"open({str(tmp_path / 'answers')!r})", f"open({str(tmp_path / 'new')!r}, 'w')"):
        assert run(f"try:\n    {attempt}\nexcept PermissionError: pass\nelse: raise SystemExit(1)") == DONE
    assert [each.name for each in tmp_path.iterdir()] == ["answers"]


def test_the_network_is_out_of_its_reach():
    if "use the network" in unprotected():
        pytest.skip("neither `unshare` works here nor does this kernel's Landlock have rules for TCP")
    with socket.create_server(("127.0.0.1", 0)) as server:
        reach = f"socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)"
        assert run(f"import socket\ntry:\n    {reach}\nexcept OSError: pass\nelse: raise SystemExit(1)") == DONE


def test_other_processes_are_out_of_its_reach():
    if "signal this user's other processes" in unprotected():
        pytest.skip("neither `unshare` works here nor does this kernel's Landlock have scopes")
    assert (
        run(f"import os\ntry:\n    os.kill({os.getpid()}, 0)\nexcept OSError: pass\nelse: raise SystemExit(1)") == DONE
    )


def test_what_is_not_held_back_is_named(monkeypatch):
    monkeypatch.setattr(sandbox, "walls", lambda: ())
    monkeypatch.setattr(confine, "landlock_version", lambda: 0)
    assert unprotected() == (
        "use the network",
        "signal this user's other processes",
        "read and write this user's files",
    )
    monkeypatch.setattr(confine, "landlock_version", lambda: 7)
    assert unprotected() == ("send data over UDP",)
    monkeypatch.setattr(sandbox, "walls", lambda: ("unshare",))
    assert unprotected() == ()


def test_where_nothing_is_safe_nothing_runs(monkeypatch):
    monkeypatch.setattr(sandbox, "walls", lambda: None)
    with pytest.raises(CannotScore, match="ordinary user"):
        run("pass")
    assert "ordinary user" in refused(True)
    assert "--allow-code" in refused(False)


@pytest.mark.parametrize("wall", [0, 1])
def test_processes_are_limited_behind_every_wall(wall):
    candidates = sandbox.candidates()
    if sandbox._run("", Limits(), candidates[wall]) != DONE:
        pytest.skip(f"`{' '.join(candidates[wall])}` does not work here")
    assert sandbox._run("import os\nos.fork()", Limits(), candidates[wall]) == 1


def test_the_sandbox_needs_the_standard_library_only():
    allowed = {"__future__", "ctypes", "os", "resource", "runpy", "sys"}
    lines = Path(confine.__file__).read_text(encoding="utf-8").splitlines()
    imported = {line.split()[1] for line in lines if line.startswith(("import ", "from "))}
    assert imported <= allowed <= sys.stdlib_module_names
