"""Composites on disk: built once, never half, bounded, and never taken from under somebody."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from adapters_registry.errors import ExpertNotFound
from adapters_registry.expert import Expert, State
from router.composite import CompositeError, compose
from router.decision import Decision, Weighted
from serving.engine import AdapterLoadFailed
from serving.materializer import Materializer
from serving.recipes import layout_of, needed_tensors


@pytest.fixture(scope="module")
def experts(adapters):
    """Four experts of rank 4, by name."""
    return {
        name: Expert(
            name=name,
            version=1,
            digest=hashlib.sha256(name.encode()).hexdigest(),
            state=State.ACTIVE,
            path=path,
            base_model="tiny",
            rank=4,
            target_modules=("q_proj", "v_proj"),
            source="test",
        )
        for name, path in zip("abcd", adapters, strict=True)
    }


class Shelf:
    """Makes materializers of one folder, and counts what is composed."""

    def __init__(self, folder: Path, experts: dict[str, Expert]) -> None:
        self.folder = folder
        self.by_id = {expert.id: expert for expert in experts.values()}
        self.experts = experts
        self.tensors: dict[tuple[str, str], dict[str, object]] = {}
        self.built: list[list[str]] = []
        self.fails: Exception | None = None

    def open(self, max_bytes: int = 2**30, max_rank: int = 16) -> Materializer:
        def find(expert_id: str) -> Expert:
            if expert_id not in self.by_id:
                raise ExpertNotFound(expert_id)
            return self.by_id[expert_id]

        def tensors(expert: Expert, key: str) -> dict[str, object] | None:
            return self.tensors.get((expert.name, key))

        return Materializer(self.folder, find=find, tensors=tensors, max_rank=max_rank, max_bytes=max_bytes)

    def compose(self, folder: Path, parts, *args, **options):
        self.built.append([part.id.partition("@")[0] for part in parts])
        layout = compose(folder, parts, *args, **options)
        if self.fails is not None:
            raise self.fails
        return layout

    def decision(self, names: str, gate: str = "arrow", **settings: object) -> Decision:
        members = tuple(Weighted(expert=name, id=self.experts[name].id, weight=1 / len(names)) for name in names)
        return Decision(method=gate, kind="gate", experts=members, gate=gate, gate_settings=settings)

    def folders(self) -> set[str]:
        return {each.name for each in self.folder.iterdir() if not each.name.startswith(".")}


@pytest.fixture
async def shelf(tmp_path, experts, monkeypatch):
    shelf = Shelf(tmp_path / "composites", experts)
    monkeypatch.setattr("serving.recipes.compose", shelf.compose)
    return shelf


@pytest.fixture
async def kept(shelf):
    materializer = shelf.open()
    yield materializer
    await materializer.close()


async def use(materializer, *decisions):
    adapters = []
    for decision in decisions:
        async with materializer.hold(decision) as adapter:
            assert layout_of(adapter.path) is not None
            adapters.append(adapter)
    return adapters


async def test_a_selected_expert_is_its_own_folder(shelf, kept):
    members = shelf.decision("a").experts
    async with kept.hold(Decision(method="retrieval", kind="select", experts=members)) as adapter:
        assert (adapter.name, adapter.shown) == (shelf.experts["a"].id, "a")
        assert adapter.path == shelf.experts["a"].path
    assert shelf.folders() == set()


async def test_a_gated_decision_is_a_composite_named_by_its_content(shelf, kept):
    [adapter] = await use(kept, shelf.decision("ab"))
    assert adapter.name == f"auto:arrow@{adapter.digest[:12]}"
    assert adapter.shown == "auto:arrow"
    assert shelf.folders() == {adapter.digest}
    layout = layout_of(adapter.path)
    assert [each.id for each in layout.members] == [shelf.experts[name].id for name in "ab"]


async def test_whoever_asks_at_once_shares_one_building(shelf, kept):
    adapters = await asyncio.gather(*(use(kept, shelf.decision("ab")) for _ in range(20)))
    assert shelf.built == [["a", "b"]]
    assert len({each.name for [each] in adapters}) == 1


async def test_one_that_leaves_does_not_stop_the_building(shelf, kept):
    task = asyncio.create_task(use(kept, shelf.decision("ab")))
    while not kept._making:
        await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    await use(kept, shelf.decision("ab"))
    assert shelf.built == [["a", "b"]]


async def test_other_members_order_gate_or_settings_are_another_composite(shelf, kept):
    decisions = [
        shelf.decision("ab"),
        shelf.decision("cd"),
        shelf.decision("dc"),
        shelf.decision("ac"),
        shelf.decision("ab", "spectr"),
        shelf.decision("ab", top_k=1),
    ]
    assert len({each.digest for each in await use(kept, *decisions)}) == 6


async def test_settings_that_mean_the_same_share_a_folder(shelf, kept):
    first, second = await use(kept, shelf.decision("ab"), shelf.decision("ab", temperature=1.0))
    assert first.digest == second.digest
    assert len(shelf.built) == 1


async def test_what_an_earlier_process_built_is_used_again(shelf):
    before = shelf.open()
    await use(before, shelf.decision("ab"))
    await before.close()
    after = shelf.open()
    await use(after, shelf.decision("ab"))
    await after.close()
    assert len(shelf.built) == 1


async def test_what_was_never_finished_is_swept_and_never_used(shelf, kept):
    await use(kept, shelf.decision("ab"))
    shelf.fails = OSError("killed")
    with pytest.raises(OSError, match="killed"):
        await use(kept, shelf.decision("cd"))
    half = shelf.folder / ".staging" / "0123"
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    assert len(shelf.folders()) == 1
    await shelf.open().close()
    assert not half.exists()
    shelf.fails = None
    await use(kept, shelf.decision("cd"))
    assert len(shelf.folders()) == 2


@pytest.mark.parametrize("spoil", ["weights", "config", "tables"])
async def test_a_damaged_composite_is_built_again(shelf, spoil):
    before = shelf.open()
    [adapter] = await use(before, shelf.decision("ab"))
    await before.close()
    name = {"weights": "adapter_model.safetensors", "config": "adapter_config.json", "tables": "gate.safetensors"}
    file = adapter.path / name[spoil]
    file.chmod(0o600)
    file.write_bytes(file.read_bytes()[:-9])
    after = shelf.open()
    [again] = await use(after, shelf.decision("ab"))
    assert again == adapter
    assert len(shelf.built) == 2
    await after.close()


async def test_the_least_recently_used_go_when_there_is_no_room(shelf):
    first = shelf.open()
    [adapter] = await use(first, shelf.decision("ab"))
    size = sum(file.stat().st_size for file in adapter.path.iterdir())
    await first.close()
    kept = shelf.open(max_bytes=int(2.5 * size))
    _, second = await use(kept, shelf.decision("ab"), shelf.decision("ac"))
    await use(kept, shelf.decision("ab"))
    [third] = await use(kept, shelf.decision("ad"))
    await kept.tidy(())
    assert shelf.folders() == {adapter.digest, third.digest}
    assert second.digest not in shelf.folders()
    await kept.close()


async def test_what_is_in_use_or_loaded_stays_whatever_the_limit(shelf):
    kept = shelf.open(max_bytes=1)
    [loaded] = await use(kept, shelf.decision("ab"))
    async with kept.hold(shelf.decision("ac")) as used:
        await kept.tidy({loaded.name})
        assert shelf.folders() == {loaded.digest, used.digest}
    await kept.tidy({loaded.name})
    assert shelf.folders() == {loaded.digest}
    await kept.tidy(())
    assert shelf.folders() == set()
    await use(kept, shelf.decision("ab"))
    await kept.close()


async def test_what_another_process_uses_stays(shelf):
    ours, theirs = shelf.open(max_bytes=1), shelf.open()
    async with theirs.hold(shelf.decision("ab")) as adapter:
        await use(ours, shelf.decision("ab"))
        await ours.tidy(())
        assert layout_of(adapter.path) is not None
    await theirs.close()
    await use(ours, shelf.decision("ab"))
    await ours.tidy(())
    assert shelf.folders() == set()
    await ours.close()


async def test_a_composite_of_somebody_who_left_goes_after_its_last_request(shelf, kept):
    [other] = await use(kept, shelf.decision("ac"))
    async with kept.hold(shelf.decision("ab")) as adapter:
        names = kept.forget(lambda member: member.startswith("b@"))
        assert names == [adapter.name]
        await kept.tidy(())
        assert layout_of(adapter.path) is not None
    await kept.tidy(())
    assert shelf.folders() == {other.digest}


async def test_members_that_left_while_no_server_ran_are_noticed(shelf):
    before = shelf.open()
    await use(before, shelf.decision("ab"))
    await before.close()
    after = shelf.open()
    assert len(after.forget(lambda member: member.startswith("a@"))) == 1
    await after.tidy(())
    assert shelf.folders() == set()
    await after.close()


@pytest.mark.parametrize(
    ("names", "gate", "settings", "says"),
    [
        ("a", "arrow", {}, "at least two"),
        ("aa", "arrow", {}, "2 times"),
        ("abcd", "arrow", {}, "over the engine's limit of 12"),
        ("ab", "nonsense", {}, "nonsense"),
        ("ab", "arrow", {"top_k": 0}, "top_k"),
        ("ab", "phatgoose", {}, "moerge gates train a"),
        ("ab", "evidence", {}, "moerge gates calibrate a"),
        ("ab", "constant", {"weights": [1.0, 0.5, 0.2]}, "3 weights for 2 members"),
    ],
)
async def test_what_cannot_be_built_says_why_and_is_not_tried_again_and_again(shelf, names, gate, settings, says):
    kept = shelf.open(max_rank=12)
    for _ in range(3):
        with pytest.raises(CompositeError) as caught:
            await use(kept, shelf.decision(names, gate, **settings))
        assert says in str(caught.value)
    assert shelf.folders() == set()
    await kept.close()


async def test_after_a_change_it_is_tried_again_with_what_is_stored_now(shelf, kept):
    decision = shelf.decision("ab", "evidence")
    with pytest.raises(CompositeError):
        await use(kept, decision)
    [key] = needed_tensors("evidence", {}, 2)
    modules = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")]
    for name in "ab":
        shelf.tensors[name, key] = {f"{m}.{kind}": np.float32(1) for m in modules for kind in ("mean", "deviation")}
    kept.renew()
    [first] = await use(kept, decision)
    shelf.tensors["a", key] = {name: value + 1 for name, value in shelf.tensors["a", key].items()}
    kept.renew()
    [second] = await use(kept, decision)
    assert first.digest != second.digest


async def test_one_that_the_engine_refuses_is_made_anew_but_not_at_once(shelf, kept):
    decision = shelf.decision("ab")
    with pytest.raises(AdapterLoadFailed):
        async with kept.hold(decision):
            raise AdapterLoadFailed("auto:arrow", "half a file")
    with pytest.raises(AdapterLoadFailed, match="half a file"):
        await use(kept, decision)
    await kept.tidy(())
    assert shelf.folders() == set()
    kept.renew()
    await use(kept, decision)
    assert len(shelf.built) == 2


async def test_an_expert_that_was_just_taken_away_is_not_found(shelf, kept):
    decision = shelf.decision("ab")
    del shelf.by_id[shelf.experts["a"].id]
    with pytest.raises(ExpertNotFound):
        await use(kept, decision)


async def test_files_that_are_being_read_are_told_of(shelf, kept):
    task = asyncio.create_task(use(kept, shelf.decision("ab")))
    while not kept.digests():
        await asyncio.sleep(0)
    assert kept.digests() == {shelf.experts["a"].digest, shelf.experts["b"].digest}
    await task
    assert kept.digests() == frozenset()


KILLED = """
import asyncio, json, os, signal, sys
from pathlib import Path
from adapters_registry.expert import Expert
from router.decision import Decision
from serving import materializer, recipes

def killed(folder, *args, **options):
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

recipes.compose = killed
folder, decision, *experts = sys.argv[1:]
experts = {each.id: each for each in map(Expert.model_validate_json, experts)}

async def main():
    made = materializer.Materializer(
        Path(folder), find=experts.get, tensors=lambda *_: None, max_rank=16, max_bytes=2**30
    )
    async with made.hold(Decision.model_validate_json(decision)):
        pass

asyncio.run(main())
"""


async def test_a_server_that_is_killed_while_it_builds_leaves_nothing_that_is_used(shelf):
    decision = shelf.decision("ab")
    experts = [shelf.experts[name].model_dump_json() for name in "ab"]
    command = [sys.executable, "-c", KILLED, str(shelf.folder), decision.model_dump_json(), *experts]
    process = await asyncio.create_subprocess_exec(*command)
    assert await process.wait() == -signal.SIGKILL
    assert len(list((shelf.folder / ".staging").iterdir())) == 1
    kept = shelf.open()
    assert list((shelf.folder / ".staging").iterdir()) == []
    assert shelf.folders() == set()
    [adapter] = await use(kept, decision)
    assert layout_of(adapter.path).gate == "arrow"
    await kept.close()
