"""A server for a suite: what it is told, that it says why it does not start, and that it outlives nobody."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from adapters_registry.expert import Sample
from adapters_registry.manifest import BaseRef, read_manifest
from adapters_registry.proposal import HubSource, Proposal
from eval.asking import EngineGone
from eval.served import RANDOM, engine_id, entry, prepare, random_adapters, served
from eval.suite import Suite, read_suite
from serving.config import load_settings

TESTBED = Path(__file__).parents[2] / "eval" / "testbed" / "data"


@pytest.fixture
def suite() -> Suite:
    return read_suite("quickstart")


def test_the_server_is_told_of_the_suite_s_experts_and_of_the_random_ones(suite, tmp_path):
    random = {"random-weights-0": TESTBED / "experts" / "reverse"}
    config = load_settings(prepare(suite, random, tmp_path, {"slots": 3}))
    assert config.manifest is not None
    told = read_manifest(config.manifest)
    assert told.base_model == suite.base_model
    *experts, last = told.proposals
    assert [each.name for each in experts] == list(suite.names)
    assert [each.source for each in experts] == [each.source for each in suite.experts]
    assert [each.samples for each in experts] == [each.samples for each in suite.experts]
    assert (last.name, last.samples) == ("random-weights-0", ())
    assert config.engine.slots == 3
    assert config.registry.data_dir == tmp_path / "data"


def test_an_expert_of_the_hub_is_told_as_a_manifest_has_it():
    source = HubSource(repo="org/lora", revision="main", subfolder="a/b")
    expert = Proposal(name="far", source=source, samples=(Sample(prompt="p", answer="a"),), tags=("x",))
    told = entry(expert)
    assert told["source"] == "hub:org/lora@main#a/b"
    assert told["samples"] == [{"prompt": "p", "answer": "a"}]
    assert told["tags"] == ["x"]


def test_a_registry_is_kept_for_the_same_experts_and_begun_anew_for_others(suite, tmp_path):
    prepare(suite, {}, tmp_path, {})
    kept = tmp_path / "data" / "kept"
    kept.parent.mkdir()
    kept.write_text("")
    prepare(suite, {}, tmp_path, {"slots": 5})
    assert kept.exists()
    prepare(suite.model_copy(update={"experts": suite.experts[1:]}), {}, tmp_path, {})
    assert not kept.exists()


def test_answers_of_another_base_model_or_another_engine_are_others(suite, tmp_path):
    def base(content: str) -> BaseRef:
        (tmp_path / "config.json").write_text(content)
        return BaseRef(name="base", model=str(tmp_path))

    first = engine_id(base("1"), {"max_rank": 64})
    assert engine_id(base("1"), {"max_rank": 64}) == first
    assert engine_id(base("1"), {"max_rank": 128}) != first
    assert engine_id(base("2"), {"max_rank": 64}) != first
    assert engine_id(base("1").model_copy(update={"dtype": "bfloat16"}), {"max_rank": 64}) != first


def test_adapters_with_random_weights_are_of_experts_all_over_the_suite(suite, tmp_path):
    from eval.deciding import known_experts

    experts = known_experts(suite.experts)
    found = random_adapters(experts, tmp_path)
    assert list(found) == [f"random-weights-{k}" for k in range(RANDOM)]
    assert len({path.name.partition("-")[0] for path in found.values()}) == RANDOM
    few = random_adapters(experts[:2], tmp_path)
    assert len(few) == 2


async def test_a_server_that_does_not_start_says_why(suite, tmp_path):
    wrong = suite.model_copy(update={"engine": {"slots": 0}, "statistics": ()})
    with pytest.raises(EngineGone, match=r"server\.log ends with[\s\S]*engine\.slots"):
        async with served(wrong, [], {}, tmp_path):
            pass


def test_settings_meant_for_another_server_are_not_this_one_s(suite, tmp_path, monkeypatch):
    from eval.served import environment

    monkeypatch.setenv("MOERGE_ENGINE__SLOTS", "99")
    assert "MOERGE_ENGINE__SLOTS" not in environment()
    told = yaml.safe_load(prepare(suite, {}, tmp_path, {"slots": 3}).read_text())
    assert told["engine"] == {"slots": 3}


PARENT = """
import subprocess, sys, time
deaf = "sleep 1000 & echo $$ $!; trap '' INT; wait; wait; sleep 1000"
command = [sys.executable, "-m", "eval.warden", "--grace", "1", "sh", "-c", deaf]
child = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
time.sleep(1000)
"""


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_and_its_children_end_with_whoever_needs_them(how):
    """Even where an interrupt is not heard: then they are killed."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(each) for each in parent.stdout.readline().split()]
    assert not any(map(gone, pids))
    parent.send_signal(how)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 60
    while not all(map(gone, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert all(map(gone, pids))


def test_a_child_that_ends_by_itself_tells_how():
    command = [sys.executable, "-m", "eval.warden", sys.executable, "-c", "raise SystemExit(7)"]
    warden = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert warden.wait() == 7
    assert warden.stdin is not None
    warden.stdin.close()
