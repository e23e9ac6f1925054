"""A content-addressed folder of adapters that survives kill -9, a full disk and several processes.

    adapters/<digest>/             adapter_config.json, adapter_model.safetensors, README.md; read-only
    adapters/.staging/<token>/     a registration in progress

A folder is written in `.staging`, synced, and renamed into place: it is there whole or not at all. Whoever needs
a folder that no database row mentions yet holds a shared `flock` on the folder itself. The lock is on the inode,
so it follows the rename, and the kernel drops it when the process dies; the collector deletes only what it can
lock exclusively. There are no lock files to lose.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from adapters_registry.errors import StoreFull
from adapters_registry.lora import CONFIG, WEIGHTS

CHUNK = 1024 * 1024
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def content_digest(folder: Path) -> str:
    """sha256 (hex) of what the adapter does: its configuration as canonical JSON, and its weights.

    Each part is preceded by its length, so no two contents run together. The model card is not part of it.
    """
    config = json.dumps(json.loads((folder / CONFIG).read_bytes()), sort_keys=True, separators=(",", ":")).encode()
    weights = folder / WEIGHTS
    sha = hashlib.sha256(b"moerge adapter 1\n")
    sha.update(len(config).to_bytes(8, "little") + config)
    sha.update(weights.stat().st_size.to_bytes(8, "little"))
    with weights.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            sha.update(chunk)
    return sha.hexdigest()


class Store:
    """The folder `root`; safe to use from many threads and processes at once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._staging = root / ".staging"
        with refuse_when_full(root):
            self._staging.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        return self.root / digest

    def digests(self) -> list[str]:
        return sorted(each.name for each in self.root.iterdir() if not each.name.startswith("."))

    def hold(self, digest: str) -> int | None:
        """A descriptor that keeps a folder from being deleted until it is closed; None when it is not there."""
        return _lock(self.path(digest), fcntl.LOCK_SH)

    def stage(self, digest: str | None = None) -> Staged:
        """An empty folder to fill; close it, whatever happens. `digest`: its address, when not its content's."""
        while True:
            folder = self._staging / uuid.uuid4().hex
            with refuse_when_full(self.root):
                folder.mkdir()
            if (lock := _lock(folder, fcntl.LOCK_SH)) is not None:
                return Staged(self, folder, lock, digest)

    def collect(self, referenced: Callable[[str], bool]) -> list[str]:
        """Delete abandoned staging folders and the digests that nobody needs; returns those digests.

        `referenced` is asked while the folder is locked, so a registration that has just committed is seen.
        """
        for folder in self._staging.iterdir():
            self._delete(folder, lambda: True)
        return [digest for digest in self.digests() if self.discard(digest, referenced)]

    def discard(self, digest: str, referenced: Callable[[str], bool]) -> bool:
        """Delete one digest unless it is referenced or held by a registration in progress."""
        return self._delete(self.path(digest), lambda: not referenced(digest))

    def _delete(self, folder: Path, may: Callable[[], bool]) -> bool:
        lock = _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is None:
            return False
        try:
            if not may():
                return False
            folder.chmod(0o700)
            if folder.parent != self._staging:
                # First out of the way in one step, so that nobody meets a half-deleted adapter.
                folder = folder.rename(self._staging / uuid.uuid4().hex)
            shutil.rmtree(folder)
            return True
        finally:
            os.close(lock)


class Staged:
    """A folder being filled, protected from the collector until it is closed.

    Leaving it without `publish` deletes it; after `publish`, `path` is final.
    """

    def __init__(self, store: Store, folder: Path, lock: int, digest: str | None = None) -> None:
        self._store = store
        self._lock: int | None = lock
        self._address = digest
        self.path = folder
        self._published = False
        self._outlives = False

    @cached_property
    def digest(self) -> str:
        """Its address, the content's unless another was given; to be asked for when all files are here."""
        return self._address or content_digest(self.path)

    def add(self, name: str, source: BinaryIO) -> None:
        """Write a file, synced to disk. Raises StoreFull."""
        with refuse_when_full(self._store.root), (self.path / name).open("xb") as target:
            shutil.copyfileobj(source, target, CHUNK)
            target.flush()
            os.fsync(target.fileno())

    def publish(self) -> None:
        """Move the folder to its content's address, or adopt the one that is there already."""
        assert not self._published, "published twice"
        final = self._store.path(self.digest)
        with refuse_when_full(self._store.root):
            for file in self.path.iterdir():
                file.chmod(0o444)
            _sync(self.path)
            while not self._move(final):
                pass  # the folder in the way was collected between our two looks at it
            _sync(self._store.root)
        self._published = True

    def _move(self, final: Path) -> bool:
        try:
            self.path.rename(final)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        else:
            final.chmod(0o555)
            self.path = final
            return True
        lock = _lock(final, fcntl.LOCK_SH)
        if lock is None:
            return False
        shutil.rmtree(self.path)
        self._release()
        self._lock, self.path = lock, final
        return True

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def outlive(self) -> Self:
        """Stay open after the `with` block; whoever gets it closes it."""
        self._outlives = True
        return self

    def close(self) -> None:
        """Drop the protection; an unpublished folder is deleted. What was published is the collector's business."""
        if self._lock is None:
            return
        if not self._published:
            shutil.rmtree(self.path, ignore_errors=True)
        self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._outlives:
            self.close()


def _lock(folder: Path, how: int) -> int | None:
    """A locked descriptor of the folder, or None when it is gone or (with LOCK_NB) in use."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, how)
        # While we waited, the folder may have been deleted, and even made anew.
        if _same(folder, descriptor):
            return descriptor
    except BlockingIOError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _same(folder: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(folder.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def refuse_when_full(where: Path) -> Iterator[None]:
    """Turn "no space left", "quota exceeded" and "file too large" into StoreFull."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StoreFull(where) from error
        raise
