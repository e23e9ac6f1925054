"""What a router has learned beside the registry: numbered files that never change, and which one is in force.

    routers/7.json           what version 7 knows, after the sha256 of just that
    routers/7.safetensors    its vectors, if it has any; their sha256 stands in the JSON
    routers/active.json      the versions that were promoted, in that order; the last one is in force

Version 0 is the registry alone: nothing learned. A file is written beside its place, synced, and renamed: it is there
whole or not at all, and a version counts only once it is promoted. One that cannot be read any more is passed over
for the last good one that was in force before it, and whoever loads it is told.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from adapters_registry.store import refuse_when_full
from router.encoder import Vectors
from router.errors import RouterError

#: Promotions that can be rolled back.
REMEMBERED = 1000


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rating(Frozen):
    """How well an expert answered a prompt, from 0 to 1; the prompt's text only where texts are kept."""

    decision: str
    expert: str
    score: float = Field(ge=0, le=1)
    text: str | None = None


class Content(Frozen):
    """What a version knows, its vectors aside.

    parent       the version in force when it was made
    ratings      what users thought of past answers, one to each row of the vectors
    encoder      the id of what made the vectors (`Router.encoder_id`)
    calibration  by method: temperature, thresholds, whatever the method reads there
    report       how it compared with its parent
    """

    number: int = Field(ge=0)
    created_at: datetime
    parent: int = Field(0, ge=0)
    note: str = ""
    ratings: tuple[Rating, ...] = ()
    encoder: str = ""
    calibration: dict[str, dict[str, Any]] = {}
    report: dict[str, Any] = {}
    vectors_sha256: str | None = None


@dataclass(frozen=True, eq=False)
class Learned:
    """One version: its content, and (n, dim) a vector of length 1 for each of its ratings."""

    content: Content
    vectors: Vectors = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    @property
    def number(self) -> int:
        return self.content.number

    @property
    def calibration(self) -> dict[str, dict[str, Any]]:
        return self.content.calibration

    @property
    def extra(self) -> dict[str, list[str]]:
        """Prompts that an expert answered well, by its name: further samples of it."""
        found: dict[str, list[str]] = {}
        for rating in self.content.ratings:
            if rating.score > NEUTRAL and rating.text is not None:
                found.setdefault(rating.expert, []).append(rating.text)
        return found

    def praised(self, encoder: str) -> dict[str, Vectors]:
        """(n, dim) by expert: prompts that it answered well and whose text is not known."""
        return self._rows(encoder, lambda rating: rating.score > NEUTRAL and rating.text is None)

    def refused(self, encoder: str) -> dict[str, Vectors]:
        """(n, dim) by expert: prompts that it answered badly."""
        return self._rows(encoder, lambda rating: rating.score < NEUTRAL)

    def judged(self, encoder: str) -> list[tuple[Rating, Vectors]]:
        """Every rating with its vector (dim,); none if another encoder made them: they cannot be compared."""
        if encoder != self.content.encoder:
            return []
        return list(zip(self.content.ratings, self.vectors, strict=True))

    def _rows(self, encoder: str, wanted: Callable[[Rating], bool]) -> dict[str, Vectors]:
        rows: dict[str, list[Vectors]] = {}
        for rating, vector in self.judged(encoder):
            if wanted(rating):
                rows.setdefault(rating.expert, []).append(vector)
        return {expert: np.stack(found) for expert, found in rows.items()}


#: The score of an answer that is neither good nor bad.
NEUTRAL = 0.5
NOTHING = Learned(Content(number=0, created_at=datetime.fromtimestamp(0, UTC)))


class NoSuchVersion(RouterError):
    def __init__(self, number: int, known: Sequence[int]) -> None:
        there = ", ".join(map(str, known)) or "none yet"
        super().__init__(f"No router version {number}. There are: {there} (0 is the registry alone).")


class VersionUnreadable(RouterError):
    def __init__(self, file: Path, why: str) -> None:
        super().__init__(f"The router file {file.name} cannot be used: {why}.")


class NothingBefore(RouterError):
    def __init__(self) -> None:
        super().__init__("No router version was in force before; `moerge router promote NUMBER` chooses one.")


@dataclass(frozen=True)
class Active:
    """The version to serve, and what was wrong with those that should have been."""

    learned: Learned
    problems: tuple[str, ...] = ()


class RouterVersions:
    """The versions in a folder; safe to use from many threads and processes at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pointer = folder / "active.json"

    def numbers(self) -> list[int]:
        """Every version that was written, oldest first, readable or not."""
        return sorted(int(file.stem) for file in self.folder.glob("*.json") if file.stem.isdecimal())

    def load(self, number: int) -> Learned:
        """One version, checked against its sha256. Raises NoSuchVersion, VersionUnreadable."""
        if number == 0:
            return NOTHING
        file = self._file(number)
        try:
            written = json.loads(file.read_bytes())
            content = written["content"]
            if _sha256(_canonical(content)) != written["sha256"]:
                raise VersionUnreadable(file, "it does not match its sha256")
            known = Content.model_validate(content)
            if known.number != number:
                raise VersionUnreadable(file, f"it is version {known.number}")
            return Learned(known, self._vectors(known))
        except FileNotFoundError:
            raise NoSuchVersion(number, self.numbers()) from None
        except (OSError, ValueError, TypeError, KeyError, ValidationError) as error:
            raise VersionUnreadable(file, _one_line(error)) from error

    def save(
        self,
        *,
        note: str = "",
        ratings: Sequence[Rating] = (),
        vectors: Vectors | None = None,
        encoder: str = "",
        calibration: Mapping[str, Mapping[str, Any]] | None = None,
        report: Mapping[str, Any] | None = None,
    ) -> Learned:
        """Write the next version; it is not in force before it is promoted. Raises StoreFull."""
        rows = np.zeros((0, 0), np.float32) if vectors is None else np.ascontiguousarray(vectors, np.float32)
        if len(rows) != len(ratings) or not np.isfinite(rows).all():
            raise ValueError(f"{len(ratings)} ratings need as many finite vectors, not {rows.shape}.")
        with self._alone():
            number = max(self.numbers(), default=0) + 1
            packed = save({"vectors": rows}) if len(rows) else None
            content = Content(
                number=number,
                created_at=datetime.now(UTC),
                parent=self.active().learned.number,
                note=note,
                ratings=tuple(ratings),
                encoder=encoder,
                calibration={name: dict(each) for name, each in (calibration or {}).items()},
                report=dict(report or {}),
                vectors_sha256=None if packed is None else _sha256(packed),
            )
            if packed is not None:  # first: a JSON file without its vectors would be a broken version
                self._write(self._file(number).with_suffix(".safetensors"), packed)
            plain = content.model_dump(mode="json")
            self._write(
                self._file(number), json.dumps({"sha256": _sha256(_canonical(plain)), "content": plain}).encode()
            )
        return Learned(content, rows)

    def promoted(self) -> list[int]:
        """The versions that were put in force, in that order; it starts with 0. Raises VersionUnreadable."""
        try:
            numbers = json.loads(self._pointer.read_bytes())
            if not isinstance(numbers, list) or not numbers or not all(type(each) is int for each in numbers):
                raise ValueError("it is no list of numbers")
            return numbers
        except FileNotFoundError:
            return [0]
        except (OSError, ValueError) as error:
            raise VersionUnreadable(self._pointer, _one_line(error)) from error

    def active(self) -> Active:
        """The version in force, or the last good one that was in force before it; never raises."""
        problems: list[str] = []
        try:
            numbers = self.promoted()
        except VersionUnreadable as error:
            return Active(NOTHING, (f"{error} Nothing learned is used; `moerge router promote NUMBER` repairs it.",))
        for number in reversed(numbers):
            try:
                return Active(
                    self.load(number), tuple(f"{each} Version {number} is used instead." for each in problems)
                )
            except RouterError as error:
                problems.append(str(error))
        return Active(NOTHING, tuple(f"{each} Nothing learned is used instead." for each in problems))

    def promote(self, number: int) -> Learned:
        """Put a version in force. Raises NoSuchVersion, VersionUnreadable."""
        learned = self.load(number)
        with self._alone():
            try:
                before = self.promoted()
            except VersionUnreadable:
                before = [0]
            if before[-1] != number:
                self._write(self._pointer, json.dumps([*before, number][-REMEMBERED:]).encode())
        return learned

    def rollback(self) -> Learned:
        """Return to the version that was in force before this one. Raises NothingBefore, VersionUnreadable."""
        with self._alone():
            numbers = self.promoted()[:-1]
            while numbers:
                try:
                    learned = self.load(numbers[-1])
                except RouterError:
                    numbers.pop()
                    continue
                self._write(self._pointer, json.dumps(numbers).encode())
                return learned
            raise NothingBefore

    def stamp(self) -> bytes:
        """Changes whenever another version is put in force; cheap enough to be asked every second."""
        try:
            return self._pointer.read_bytes()
        except OSError:
            return b""

    def _file(self, number: int) -> Path:
        return self.folder / f"{number}.json"

    def _vectors(self, content: Content) -> Vectors:
        file = self._file(content.number).with_suffix(".safetensors")
        if content.vectors_sha256 is None:
            return np.zeros((0, 0), np.float32)
        try:
            packed = file.read_bytes()
            if _sha256(packed) != content.vectors_sha256:
                raise VersionUnreadable(file, "it does not match its sha256")
            vectors = np.asarray(load(packed)["vectors"], np.float32)
        except (OSError, KeyError, SafetensorError) as error:
            raise VersionUnreadable(file, _one_line(error)) from error
        if vectors.ndim != 2 or len(vectors) != len(content.ratings) or not np.isfinite(vectors).all():
            raise VersionUnreadable(file, f"{vectors.shape} is no vector for each of {len(content.ratings)} ratings")
        return vectors

    def _write(self, target: Path, data: bytes) -> None:
        """The whole file or none of it, on disk before this returns."""
        with refuse_when_full(self.folder):
            descriptor, name = tempfile.mkstemp(dir=self.folder, prefix=".tmp")
            try:
                with os.fdopen(descriptor, "wb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                Path(name).replace(target)
            except BaseException:
                Path(name).unlink()
                raise
            folder = os.open(self.folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One writer at a time; the kernel releases the lock of one that dies, and what that left is cleared."""
        with refuse_when_full(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for left in self.folder.glob(".tmp*"):
                left.unlink()
            yield


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _one_line(error: Exception) -> str:
    why = error.strerror if isinstance(error, OSError) else str(error)
    return " ".join(str(why).split())[:200] or type(error).__name__
