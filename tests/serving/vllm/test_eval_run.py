"""`moerge eval run` on real vLLM, of its own and another's: the slow twin's answers; a kill -9 changes nothing."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from eval.cache import CACHE
from eval.records import REFERENCES, Record, read_records, read_run
from tests.serving.vllm.conftest import TESTBED

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

TASKS = ("reverse", "roman")
MIX = {"top_k": 3, "spread": 0.2, "threshold": -1, "grid": 0.25}
ROUTERS: list[dict[str, Any]] = [
    {"name": "retrieval", "method": "retrieval"},
    {"name": "mixture", "method": "retrieval", "settings": MIX},
    {"name": "ties", "method": "retrieval", "settings": {**MIX, "operator": "ties"}},
    {"name": "regmean", "method": "retrieval", "settings": {**MIX, "operator": "regmean"}},
    {"name": "arrow", "method": "arrow"},
    {"name": "pair", "blend": {"experts": ["reverse", "uppercase"], "operator": "knots"}},
    {"name": "auto", "model": "auto"},
]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Asked two at a time, so that there is a middle to be killed in."""
    path = tmp_path_factory.mktemp("suite") / "small.yaml"
    tasks = [{"name": name, "expert": name, "data": str(TESTBED / "test" / f"{name}.jsonl")} for name in TASKS]
    told = {
        "name": "small",
        "manifest": str(TESTBED / "manifest.yaml"),
        "concurrency": 2,
        "engine": {"slots": 4, "max_rank": 64},  # as the other server of these tests
        "statistics": ["gram"],
        "defaults": {"prompt": "{{ prompt }}", "answer": "{{ answer }}", "max_tokens": 24, "limit": 2},
        "tasks": [*tasks, {"name": "strange", "data": str(TESTBED / "ood.jsonl")}],
        "routers": ROUTERS,
    }
    path.write_text(yaml.safe_dump(told))
    return path


def command(suite: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "serving.cli", "eval", "run", str(suite), "--out", str(out), *more]


def ran(suite: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(suite, out, *more), capture_output=True, text=True, check=False)


def answers(out: Path) -> int:
    """How many the cache has on disk."""
    if not (out / CACHE).exists():
        return 0
    with closing(sqlite3.connect(f"file:{out / CACHE}?mode=ro", uri=True)) as database:
        try:
            return int(database.execute("SELECT count(*) FROM known WHERE key LIKE 'answer/%'").fetchone()[0])
        except sqlite3.OperationalError:  # no table yet
            return 0


def what_came(out: Path, leave_out: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Without times; and without costs, as nobody knows to which rank another's server cuts a blend."""
    records = (each for each in read_records(out) if each.router not in leave_out)
    return [each.model_dump(exclude={"route_ms", "answer_ms", "flops"}) for each in records]


@pytest.fixture(scope="module")
def whole(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruption, on a server of its own, which is gone when it is done."""
    out = tmp_path_factory.mktemp("whole")
    done = ran(suite, out)
    assert done.returncode == 0, done.stderr
    assert "| oracle |" in done.stdout
    ours = str(out / "server" / "config.yaml")
    assert not [each for each in psutil.process_iter(["cmdline"]) if ours in (each.info["cmdline"] or ())]
    return out


def of(out: Path, router: str, regime: str = "in-distribution") -> list[Record]:
    return [each for each in read_records(out) if (each.router, each.regime) == (router, regime)]


def mean(records: Sequence[Record]) -> float:
    scores = [each.score for each in records if each.score is not None]
    return sum(scores) / len(scores)


def test_the_run_is_complete_and_says_what_the_testbed_is_known_for(whole):
    run = read_run(whole)
    assert run.complete, run.missing
    names = {each.name for each in run.routers}
    assert names >= {each["name"] for each in ROUTERS} | set(REFERENCES)
    assert mean(of(whole, "oracle")) > 0.8
    assert mean(of(whole, "retrieval")) > 0.8
    assert mean(of(whole, "base")) < 0.5
    assert mean(of(whole, "retrieval", "ood")) < 0.5
    assert {each.experts for each in of(whole, "auto")} == {*(((name, 1.0),) for name in TASKS), ()}
    assert {each["router"] for each in run.traces} == {"arrow"}
    assert all(each["trace"]["weights"] for each in run.traces)
    assert (whole / "report.html").is_file()


def test_answers_are_those_of_transformers_and_peft(whole, suite, tmp_path):
    """A token that is as likely as another but for rounding may be the other one."""
    named = [each["name"] for each in ROUTERS if "model" not in each]
    only = [part for name in named for part in ("--router", name)]
    done = ran(suite, tmp_path, "--engine", "peft", *only)
    assert done.returncode == 0, done.stderr
    told = {(each.router, each.regime, each.example, each.seed): each for each in read_records(tmp_path)}
    both = [
        (each, told[key])
        for each in read_records(whole)
        if (key := (each.router, each.regime, each.example, each.seed)) in told
    ]
    assert {fast.router for fast, _ in both} >= {"oracle", "uniform", "random-weights", *named}
    decided = [(fast.experts, fast.adapter, fast.ranked) for fast, _ in both]
    assert decided == [(slow.experts, slow.adapter, slow.ranked) for _, slow in both]
    differ = [(fast.router, fast.answer, slow.answer) for fast, slow in both if fast.answer != slow.answer]
    assert len(differ) <= len(both) / 50, differ


def test_a_kill_in_the_middle_changes_nothing(server, whole, suite, tmp_path):
    """On another server, which has neither statistics nor random weights, and `auto` without those."""
    same = [each["name"] for each in ROUTERS if each["name"] not in ("auto", "regmean")]
    only = [part for name in same for part in ("--router", name)]
    arguments = command(suite, tmp_path, "--endpoint", server.url, *only)
    killed = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not answers(tmp_path) and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert 0 < answers(tmp_path) < answers(whole)
    assert not (tmp_path / "run.json").exists()
    done = ran(suite, tmp_path, "--endpoint", server.url, *only)
    assert done.returncode == 0, done.stderr
    found, wanted = what_came(tmp_path), what_came(whole, ("random-weights", "auto", "regmean"))
    differ = [pair for pair in zip(found, wanted, strict=True) if pair[0] != pair[1]]
    assert len(differ) <= len(wanted) / 50, differ[0]  # two servers may round a tie in two ways
    assert {each["example"] for each in read_run(tmp_path).traces} == {
        each["example"] for each in read_run(whole).traces
    }
