"""Fetch an adapter's files into a staging folder, wherever they come from.

Only `adapter_config.json`, `adapter_model.safetensors` and `README.md` are ever copied. What is wrong with the
files is returned as reasons, so that it is reported together with everything else; what is wrong with the source
(no such repo, no connection) is raised as a SourceError.
"""

from __future__ import annotations

import io
import stat
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from adapters_registry.errors import Reason, SourceNotFound
from adapters_registry.hub import Hub
from adapters_registry.lora import CARD, KEPT, WEIGHTS
from adapters_registry.proposal import FolderSource, HubSource, Source, Upload, UploadSource
from adapters_registry.store import Staged
from adapters_registry.validate import Limits, only_pickle

Progress = Callable[[str, float], None]


@dataclass
class Fetched:
    """Where the files came from, as kept with the version, and what is wrong with them so far.

    `refused` are files that exist but were not copied, for one of the reasons.
    """

    origin: str
    reasons: list[Reason] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)

    def refuse(self, name: str, code: str, message: str) -> None:
        self.reasons.append(Reason(code, message))
        self.refused.add(name)


def fetch(source: Source, staged: Staged, limits: Limits, hub: Hub, progress: Progress) -> Fetched:
    """Copy the source's files into `staged`. Raises SourceError or StoreFull."""
    match source:
        case HubSource():
            return _from_hub(source, staged, limits, hub, progress)
        case FolderSource():
            return _from_folder(source.path, staged, limits)
        case UploadSource():
            return _from_upload(source.files, staged, limits)


def _from_hub(source: HubSource, staged: Staged, limits: Limits, hub: Hub, progress: Progress) -> Fetched:
    fetched = Fetched(f"hub:{source.repo}")
    if source.subfolder is not None and not _inside(source.subfolder):
        fetched.refuse(WEIGHTS, "path_traversal", f"The subfolder {source.subfolder!r} leaves the repository.")
        return fetched
    snapshot = hub.resolve(source)
    fetched.origin = snapshot.origin
    if WEIGHTS not in snapshot.sizes and (reason := only_pickle(snapshot.names)):
        fetched.refuse(WEIGHTS, reason.code, reason.message)
    wanted = [name for name in KEPT if name in snapshot.sizes and _fits(name, snapshot.sizes[name], limits, fetched)]
    total, before = sum(snapshot.sizes[name] for name in wanted) or 1, 0
    for name in wanted:
        size = snapshot.sizes[name]
        path = hub.download(snapshot, name, partial(_tell_part, progress, before / total, size / total))
        before += size
        with path.open("rb") as stream:
            _copy(staged, name, stream, limits, fetched)
    return fetched


def _from_folder(path: Path, staged: Staged, limits: Limits) -> Fetched:
    folder = path.expanduser().resolve()
    if not folder.is_dir():
        raise SourceNotFound(f"There is no folder {path}.")
    fetched = Fetched(f"folder:{folder}")
    for name in KEPT:
        file = folder / name
        if not file.is_symlink() and not file.exists():
            continue
        if not file.resolve().is_relative_to(folder):
            advice = "Copy the file, or register an adapter in the Hub's cache as hub:org/repo."
            fetched.refuse(name, "path_traversal", f"{name} is a link that leaves the folder. {advice}")
        elif not file.exists() or not stat.S_ISREG(file.stat().st_mode):  # opening a pipe would wait for ever
            fetched.refuse(name, "path_traversal", f"{name} is not a regular file.")
        else:
            with file.open("rb") as stream:
                _copy(staged, name, stream, limits, fetched)
    if not (folder / WEIGHTS).exists() and (reason := only_pickle(each.name for each in folder.iterdir())):
        fetched.refuse(WEIGHTS, reason.code, reason.message)
    return fetched


def _from_upload(files: Mapping[str, Upload], staged: Staged, limits: Limits) -> Fetched:
    fetched = Fetched("upload")
    seen: set[str] = set()
    for given, content in files.items():
        name = PurePosixPath(given).name  # browsers send a chosen folder's name along
        if not _inside(given):
            fetched.refuse(name, "path_traversal", f"{given[:80]!r} is not a plain file name.")
        elif name in seen:
            fetched.refuse(name, "duplicate_file", f"There are two files called {name}; upload one adapter at a time.")
        elif name in KEPT:
            seen.add(name)
            with _opened(content) as stream:
                _copy(staged, name, stream, limits, fetched)
    if WEIGHTS not in seen and (reason := only_pickle(files)):
        fetched.refuse(WEIGHTS, reason.code, reason.message)
    return fetched


def _tell_part(progress: Progress, start: float, share: float, fraction: float) -> None:
    progress("fetch", start + share * fraction)


def _copy(staged: Staged, name: str, stream: BinaryIO, limits: Limits, fetched: Fetched) -> None:
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    if _fits(name, size, limits, fetched):
        staged.add(name, stream)


def _fits(name: str, size: int, limits: Limits, fetched: Fetched) -> bool:
    most = limits.bytes_for(name)
    if size > most and name != CARD:  # without its card an adapter works all the same
        fetched.refuse(name, "too_large", f"{name} has {size:,} bytes; at most {most:,} are accepted.")
    return size <= most


def _opened(content: Upload) -> AbstractContextManager[BinaryIO]:
    match content:
        case bytes():
            return io.BytesIO(content)
        case Path():
            return content.open("rb")
        case _:
            return nullcontext(content)


def _inside(name: str) -> bool:
    """A relative path that stays where it is put."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and "\\" not in name and "\0" not in name
