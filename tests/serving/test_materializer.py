"""Composites and blends on disk: built once, never half, bounded, and never taken from under somebody."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from adapters_registry.errors import ExpertNotFound
from adapters_registry.expert import Expert, State
from router.blending import LINEAGE, BlendError, blend
from router.composite import compose
from router.decision import Decision, Weighted
from serving.engine import AdapterLoadFailed
from serving.materializer import Materializer
from serving.recipes import kept as kept_in
from serving.recipes import needed_tensors, recipe_of


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
    """Makes materializers of one folder, and counts what is built; decisions are for one kind of thing."""

    def __init__(self, folder: Path, experts: dict[str, Expert], kind: str) -> None:
        self.folder = folder
        self.kind = kind
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
        return self.counted(compose, folder, parts, *args, **options)

    def blend(self, folder: Path, parts, *args, **options):
        return self.counted(blend, folder, parts, *args, **options)

    def counted(self, build, folder: Path, parts, *args, **options):
        self.built.append([part.id.partition("@")[0] for part in parts])
        done = build(folder, parts, *args, **options)
        if self.fails is not None:
            raise self.fails
        return done

    def decision(self, names: str, how: str | None = None, **settings: object) -> Decision:
        """`how`: the gate or operator, one that is there for all when not given."""
        members = tuple(Weighted(expert=name, id=self.experts[name].id, weight=1 / len(names)) for name in names)
        if self.kind == "blend":
            merged = {"operator": how or "cat", "operator_settings": settings}
            return Decision(method="retrieval", kind="blend", experts=members, **merged)
        return Decision(method="arrow", kind="gate", experts=members, gate=how or "arrow", gate_settings=settings)

    def folders(self) -> set[str]:
        return {each.name for each in self.folder.iterdir() if not each.name.startswith(".")}


@pytest.fixture(params=["composite", "blend"])
async def shelf(tmp_path, experts, monkeypatch, request):
    shelf = Shelf(tmp_path / "built", experts, request.param)
    monkeypatch.setattr("serving.recipes.compose", shelf.compose)
    monkeypatch.setattr("serving.recipes.blend", shelf.blend)
    return shelf


composites = pytest.mark.parametrize("shelf", ["composite"], indirect=True)
blends = pytest.mark.parametrize("shelf", ["blend"], indirect=True)


@pytest.fixture
async def kept(shelf):
    materializer = shelf.open()
    yield materializer
    await materializer.close()


async def use(materializer, *decisions):
    adapters = []
    for decision in decisions:
        async with materializer.hold(decision) as adapter:
            assert kept_in(adapter.path) is not None
            adapters.append(adapter)
    return adapters


async def test_a_selected_expert_is_its_own_folder(shelf, kept):
    members = shelf.decision("a").experts
    async with kept.hold(Decision(method="retrieval", kind="select", experts=members)) as adapter:
        assert (adapter.name, adapter.shown) == (shelf.experts["a"].id, "a")
        assert adapter.path == shelf.experts["a"].path
    assert shelf.folders() == set()


async def test_what_is_built_is_named_by_its_content(shelf, kept):
    [adapter] = await use(kept, shelf.decision("ab"))
    name = {"composite": "auto:arrow", "blend": "blend:cat"}[shelf.kind]
    assert adapter.name == f"{name}@{adapter.digest[:32]}"
    assert adapter.shown == {"composite": "auto:arrow", "blend": f"blend:{adapter.digest[:12]}"}[shelf.kind]
    assert shelf.folders() == {adapter.digest}
    found = kept_in(adapter.path)
    assert (found.kind, found.adapter) == (shelf.kind, adapter)
    assert found.members == {shelf.experts[name].id for name in "ab"}


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


async def test_settings_that_mean_the_same_share_a_folder(shelf, kept):
    default = {"composite": {"temperature": 1.0}, "blend": {"rank": None}}[shelf.kind]
    first, second = await use(kept, shelf.decision("ab"), shelf.decision("ab", **default))
    assert first.digest == second.digest
    assert len(shelf.built) == 1


async def test_they_share_it_also_when_they_ask_at_once(shelf, kept):
    default = {"composite": {"temperature": 1.0}, "blend": {"rank": None}}[shelf.kind]
    await asyncio.gather(*(use(kept, shelf.decision("ab", **settings)) for settings in ({}, default) * 5))
    assert len(shelf.built) == 1
    assert len(shelf.folders()) == 1
    await kept.tidy(())


async def test_whoever_is_refused_does_not_wait_for_those_that_build(shelf, kept, monkeypatch):
    begun, go = threading.Event(), threading.Event()

    def slow(*args, **options):
        begun.set()
        assert go.wait(10)
        return shelf.counted({"composite": compose, "blend": blend}[shelf.kind], *args, **options)

    monkeypatch.setattr("serving.recipes.compose", slow)
    monkeypatch.setattr("serving.recipes.blend", slow)
    building = asyncio.create_task(use(kept, shelf.decision("ab")))
    try:
        assert await asyncio.to_thread(begun.wait, 10)
        with pytest.raises(ValueError, match="nonsense"):
            await use(kept, shelf.decision("cd", "nonsense"))
        assert not building.done()
    finally:
        go.set()
    await building


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


@pytest.mark.parametrize("spoil", ["adapter_model.safetensors", "adapter_config.json", "its own"])
async def test_what_is_damaged_is_built_again(shelf, spoil):
    before = shelf.open()
    [adapter] = await use(before, shelf.decision("ab"))
    await before.close()
    own = {"composite": "gate.safetensors", "blend": LINEAGE}[shelf.kind]
    file = adapter.path / (own if spoil == "its own" else spoil)
    file.chmod(0o600)
    file.write_bytes(file.read_bytes()[:-9])
    after = shelf.open()
    [again] = await use(after, shelf.decision("ab"))
    assert again == adapter
    assert len(shelf.built) == 2
    await after.close()


@blends
async def test_a_blend_in_another_s_place_is_built_again(shelf):
    before = shelf.open()
    one, other = await use(before, shelf.decision("ab"), shelf.decision("cd"))
    await before.close()
    for file in one.path.iterdir():
        file.chmod(0o600)
        file.write_bytes((other.path / file.name).read_bytes())
    after = shelf.open()
    await use(after, shelf.decision("ab"))
    assert len(shelf.built) == 3
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


async def test_what_is_loaded_goes_as_well_when_it_is_the_least_recently_used_of_too_much(shelf):
    first = shelf.open()
    one, other = await use(first, shelf.decision("ab"), shelf.decision("cd"))
    size = sum(file.stat().st_size for file in one.path.iterdir())
    await first.close()
    kept = shelf.open(max_bytes=int(1.5 * size))
    await use(kept, shelf.decision("ab"), shelf.decision("cd"))
    async with kept.hold(shelf.decision("ab")):
        assert kept.excess() == [other.name]
    await use(kept, shelf.decision("cd"))
    assert kept.excess() == [one.name]
    await kept.tidy({other.name})
    assert kept.excess() == []
    assert shelf.folders() == {other.digest}
    await kept.close()


@blends
async def test_a_sum_does_not_wait_for_operators_that_take_long(shelf, kept, monkeypatch):
    begun, go = threading.Event(), threading.Event()

    def slow(folder, parts, weights, operator, *args, **options):
        if operator == "ties":
            begun.set()
            assert go.wait(10)
        return blend(folder, parts, weights, operator, *args, **options)

    monkeypatch.setattr("serving.recipes.blend", slow)
    building = asyncio.create_task(use(kept, shelf.decision("ab", "ties")))
    try:
        assert await asyncio.to_thread(begun.wait, 10)
        await use(kept, shelf.decision("ab", "cat"), shelf.decision("ab", "svd"))
        assert not building.done()
    finally:
        go.set()
    await building


async def test_what_another_process_uses_stays(shelf):
    ours, theirs = shelf.open(max_bytes=1), shelf.open()
    async with theirs.hold(shelf.decision("ab")) as adapter:
        await use(ours, shelf.decision("ab"))
        await ours.tidy(())
        assert kept_in(adapter.path) is not None
    await theirs.close()
    await use(ours, shelf.decision("ab"))
    await ours.tidy(())
    assert shelf.folders() == set()
    await ours.close()


async def test_what_was_built_of_somebody_who_left_goes_after_its_last_request(shelf, kept):
    [other] = await use(kept, shelf.decision("ac"))
    async with kept.hold(shelf.decision("ab")) as adapter:
        names = kept.forget(lambda member: member.startswith("b@"))
        assert names == [adapter.name]
        await kept.tidy(())
        assert kept_in(adapter.path) is not None
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


async def test_what_cannot_be_built_says_why_and_is_not_tried_again_and_again(shelf, kept, monkeypatch):
    looked = []
    recipe = type(recipe_of(shelf.decision("ab")))
    plan = recipe.plan
    monkeypatch.setattr(recipe, "plan", lambda *args: looked.append(args) or plan(*args))
    for _ in range(3):
        with pytest.raises(ValueError, match="nonsense"):
            await use(kept, shelf.decision("ab", "nonsense"))
    assert len(looked) == 1
    assert shelf.folders() == set()


@blends
async def test_statistics_are_those_that_are_stored_now(shelf, kept):
    decision = shelf.decision("ab", "fisher")
    with pytest.raises(BlendError, match="moerge expert stats a"):
        await use(kept, decision)
    shapes = {"q_proj": (32, 32), "v_proj": (16, 32)}
    modules = {f"model.layers.{i}.self_attn.{name}": shape for i in range(2) for name, shape in shapes.items()}
    for name in "ab":
        shelf.tensors[name, "fisher"] = {module: np.ones(shape, np.float32) for module, shape in modules.items()}
    kept.renew()
    [first] = await use(kept, decision)
    shelf.tensors["a", "fisher"] = {name: value + 1 for name, value in shelf.tensors["a", "fisher"].items()}
    kept.renew()
    [second] = await use(kept, decision)
    assert first.digest != second.digest


@composites
async def test_after_a_change_it_is_tried_again_with_what_is_stored_now(shelf, kept):
    decision = shelf.decision("ab", "evidence")
    with pytest.raises(ValueError, match="moerge gates calibrate a"):
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
            raise AdapterLoadFailed("it", "half a file")
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
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

recipes.compose = recipes.blend = killed
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
    assert kept_in(adapter.path).kind == shelf.kind
    await kept.close()
