"""kill -9 at any moment of a registration, or of storing a blend: afterwards what was to be is whole, or absent."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from adapters_registry.base import BaseSpec
from adapters_registry.expert import State
from adapters_registry.proposal import FolderSource, Proposal
from adapters_registry.registry import Registry
from adapters_registry.store import content_digest

KILLS = 24

# One process imports everything once and forks a child for each kill. A child counts the Python functions it enters
# (in whatever package) and kills itself at its number: between any two of the steps that matter, some child dies.
PROGRAM = """
import json, os, signal, sys
from pathlib import Path
import torch
from adapters_registry.base import BaseSpec
from adapters_registry.blends import BlendMember, NewBlend
from adapters_registry.expert import State
from adapters_registry.proposal import FolderSource, Proposal
from adapters_registry.registry import Registry

torch.set_num_threads(1)
root, adapter, modules, kills = sys.argv[1:5]
base = BaseSpec("tiny", {name: tuple(shape) for name, shape in json.loads(modules).items()})

def register(folder, kill_at):
    count = 0
    def profile(frame, event, argument):
        nonlocal count
        count += event == "call"
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    with Registry.open(folder, base=base) as registry:
        sys.setprofile(profile)
        source = FolderSource(path=Path(adapter))
        with registry.prepare(Proposal(name=folder.name, source=source, allow_base_mismatch=True)) as prepared:
            expert = registry.commit(prepared, state=State.ACTIVE, prototypes={"minilm": [[1.0]]})
        member = BlendMember(expert=expert.name, version=1, digest=expert.digest, weight=0.5)
        registry.blends.create(NewBlend(name="blend", digest="0" * 64, members=(member,), operator="cat"))
        sys.setprofile(None)
    if 0 < count < kill_at:  # a run may take fewer calls than the first one did: then it dies right after
        os.kill(os.getpid(), signal.SIGKILL)
    return count

def child(work):
    pid = os.fork()
    if pid == 0:
        work()
        os._exit(0)
    return os.WTERMSIG(os.waitpid(pid, 0)[1])

def report():
    (Path(root) / "total").write_text(str(register(Path(root) / "unharmed", 0)))

child(report)
total, kills = int((Path(root) / "total").read_text()), int(kills)
points = sorted({1 + number * (total - 1) // (kills - 1) for number in range(kills)})
print(json.dumps({point: child(lambda: register(Path(root) / f"kill-{point}", point)) for point in points}))
"""


def killed(root: Path, adapter: Path, base: BaseSpec) -> dict[str, int]:
    """The signal that ended each child, by the call at which it was to be killed."""
    arguments = [str(root), str(adapter), json.dumps(dict(base.modules)), str(KILLS)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], check=True, stdout=subprocess.PIPE, text=True, timeout=250
    )
    signals: dict[str, int] = json.loads(done.stdout)
    return signals


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, adapters: list[Path], base: BaseSpec) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    signals = killed(folder, adapters[0], base)
    assert len(signals) == KILLS
    assert set(signals.values()) == {9}, "every child died at its point"
    return folder


def test_an_expert_is_whole_or_absent_and_can_be_registered_again(
    root: Path, adapters: list[Path], base: BaseSpec
) -> None:
    outcomes = []
    for data in sorted(root.glob("kill-*")):
        with Registry.open(data, base=base) as registry:
            found, blends = registry.experts(), registry.blends.list()
            outcomes.append((len(found), len(blends)))
            assert [expert.digest for expert in found] == registry.store.digests()
            assert list((registry.store.root / ".staging").iterdir()) == []
            assert len(blends) <= len(found)
            assert registry.generation() == len(found) + len(blends) == len(registry.events())
            assert list(registry.prototypes("minilm")) == [expert.id for expert in found]
            for expert in found:
                assert content_digest(expert.path) == expert.digest
            if not found:
                again = Proposal(name=data.name, source=FolderSource(path=adapters[0]), allow_base_mismatch=True)
                with registry.prepare(again) as prepared:
                    registry.commit(prepared, state=State.ACTIVE)
    assert {(0, 0), (1, 1)} <= set(outcomes), "some died before the first commit and some after the last"
