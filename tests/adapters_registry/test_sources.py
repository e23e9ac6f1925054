"""Files come in from folders and uploads; only the three that matter, and only honest ones."""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path

import pytest

from adapters_registry.base import BaseSpec
from adapters_registry.errors import ExpertRefused, SourceNotFound, StoreFull
from adapters_registry.expert import State
from adapters_registry.proposal import FolderSource, Proposal, Upload, UploadSource
from adapters_registry.registry import Registry
from adapters_registry.validate import Limits

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def registry(tmp_path: Path, base: BaseSpec) -> Registry:
    return Registry.open(tmp_path / "data", base=base)


def uploaded(files: dict[str, Upload]) -> Proposal:
    return Proposal(name="a", source=UploadSource(files=files))


def folder(path: Path) -> Proposal:
    return Proposal(name="a", source=FolderSource(path=path))


def refusal(registry: Registry, proposal: Proposal) -> frozenset[str]:
    with pytest.raises(ExpertRefused) as refused:
        registry.prepare(proposal)
    assert list((registry.store.root / ".staging").iterdir()) == []
    return refused.value.codes


def test_only_the_files_of_an_adapter_are_kept(registry: Registry, adapter: Path) -> None:
    (adapter / "optimizer.pt").write_bytes(b"\x80\x02.")
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / "checkpoint-1").mkdir()
    with registry.prepare(folder(adapter)) as prepared:
        assert {file.name for file in prepared.expert.path.iterdir()} == {CONFIG, WEIGHTS, "README.md"}


def test_the_folder_may_change_afterwards(registry: Registry, adapter: Path) -> None:
    with registry.prepare(folder(adapter)) as prepared:
        (adapter / WEIGHTS).write_bytes(b"")
        shutil.rmtree(adapter)
        expert = registry.commit(prepared, state=State.ACTIVE)
    assert (expert.path / WEIGHTS).stat().st_size > 0


def test_a_missing_folder_is_not_found(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(SourceNotFound, match="There is no folder"):
        registry.prepare(folder(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "README.md"])
def test_links_that_leave_the_folder_are_refused(registry: Registry, adapter: Path, tmp_path: Path, name: str) -> None:
    (adapter / name).rename(tmp_path / "elsewhere")
    (adapter / name).symlink_to(tmp_path / "elsewhere")
    assert refusal(registry, folder(adapter)) == {"path_traversal"}


def test_links_inside_the_folder_are_followed(registry: Registry, adapter: Path) -> None:
    (adapter / WEIGHTS).rename(adapter / "weights")
    (adapter / WEIGHTS).symlink_to("weights")
    registry.prepare(folder(adapter)).close()


def test_a_link_to_nothing_is_refused(registry: Registry, adapter: Path) -> None:
    (adapter / WEIGHTS).unlink()
    (adapter / WEIGHTS).symlink_to("nothing")
    assert refusal(registry, folder(adapter)) == {"path_traversal"}


def test_a_pipe_is_not_waited_for(registry: Registry, adapter: Path) -> None:
    (adapter / WEIGHTS).unlink()
    os.mkfifo(adapter / WEIGHTS)
    assert refusal(registry, folder(adapter)) == {"path_traversal"}


def test_the_folder_itself_may_be_a_link(registry: Registry, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(adapter)
    registry.prepare(folder(tmp_path / "link")).close()


def test_what_is_too_large_is_not_copied(tmp_path: Path, base: BaseSpec, adapter: Path) -> None:
    limits = Limits(max_bytes=10, max_config_bytes=10, max_card_bytes=10)
    registry = Registry.open(tmp_path / "data", base=base, limits=limits)
    assert refusal(registry, folder(adapter)) == {"too_large"}


def test_an_oversized_card_is_left_behind(tmp_path: Path, base: BaseSpec, adapter: Path) -> None:
    registry = Registry.open(tmp_path / "data", base=base, limits=Limits(max_card_bytes=10))
    with registry.prepare(folder(adapter)) as prepared:
        assert not (prepared.expert.path / "README.md").exists()


def test_a_folder_with_only_a_pickle(registry: Registry, adapter: Path) -> None:
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    assert refusal(registry, folder(adapter)) == {"only_pickle"}


@pytest.mark.parametrize("prefix", ["", "my-adapter/"])
def test_uploads_come_as_bytes_streams_or_paths(registry: Registry, adapter: Path, prefix: str) -> None:
    with (adapter / WEIGHTS).open("rb") as stream:
        files: dict[str, Upload] = {
            f"{prefix}{CONFIG}": (adapter / CONFIG).read_bytes(),
            f"{prefix}{WEIGHTS}": stream,
            f"{prefix}README.md": adapter / "README.md",
            f"{prefix}notes.txt": b"ignored",
        }
        with registry.prepare(uploaded(files)) as prepared:
            assert prepared.expert.source == "upload"
            assert (prepared.expert.path / WEIGHTS).read_bytes() == (adapter / WEIGHTS).read_bytes()


def test_an_upload_has_the_digest_of_the_same_folder(registry: Registry, adapter: Path) -> None:
    with registry.prepare(folder(adapter)) as prepared:
        digest = prepared.expert.digest
    files: dict[str, Upload] = {name: io.BytesIO((adapter / name).read_bytes()) for name in (CONFIG, WEIGHTS)}
    with registry.prepare(uploaded(files)) as prepared:
        assert prepared.expert.digest == digest


@pytest.mark.parametrize("name", ["../{}", "/etc/{}", "a/../../{}", "a\\{}", "{}\0"])
def test_names_that_leave_the_folder_are_refused(registry: Registry, adapter: Path, name: str) -> None:
    files: dict[str, Upload] = {file: adapter / file for file in (CONFIG, "README.md")}
    assert "path_traversal" in refusal(registry, uploaded({**files, name.format(WEIGHTS): adapter / WEIGHTS}))


def test_two_adapters_in_one_upload_are_refused(registry: Registry, adapter: Path) -> None:
    files: dict[str, Upload] = {f"{part}/{name}": adapter / name for part in "ab" for name in (CONFIG, WEIGHTS)}
    assert refusal(registry, uploaded(files)) == {"duplicate_file"}


def test_an_upload_of_only_a_pickle(registry: Registry, adapter: Path) -> None:
    files: dict[str, Upload] = {CONFIG: adapter / CONFIG, "adapter_model.bin": b"\x80\x02."}
    assert refusal(registry, uploaded(files)) == {"only_pickle"}


def test_an_empty_upload_says_what_is_missing(registry: Registry) -> None:
    assert refusal(registry, uploaded({})) == {"not_lora", "missing_weights"}


def test_a_full_disk_leaves_nothing_half_registered(
    registry: Registry, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(StoreFull):
            registry.prepare(folder(adapter))
    assert registry.store.digests() == []
    assert registry.experts() == []
    registry.prepare(folder(adapter)).close()
