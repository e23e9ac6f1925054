"""The rows of a task's data, one at a time: JSONL files, and everything that `datasets.load_dataset` reads."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from eval.extra import extra
from eval.suite import Data

LINES = (".jsonl", ".ndjson")
#: Other files that can be read, and what `datasets` calls their kind.
KINDS = {".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow", ".txt": "text"}


class NoData(Exception):
    """Data that cannot be had, with how to get it."""


class Unreachable(NoData):
    """A data set that is not here, after half a minute of trying to reach the Hub."""


@dataclass(frozen=True)
class Row:
    """number   of its line, from 1, or of a data set's row, from 0
    place    for messages: `file:line`, or the data set and `row 12`
    columns  by name; None where the row is none, for the reason in `problem`
    """

    number: int
    place: str
    columns: Mapping[str, Any] | None = None
    problem: str = ""


def rows_of(data: Data, *, shuffle: int | None = None, local: Mapping[str, Path] | None = None) -> Iterator[Row]:
    """In their order, or in one drawn with a seed; nothing beyond the row at hand is kept but where rows are.

    `local` has files and folders for data that is given, and that stand in for data sets of the Hub, by their names.
    Raises NoData, and ExtraMissing without `datasets`.
    """
    name = data.hub or data.given
    path = Path(data.path) if data.path is not None else (local or {}).get(str(name))
    if path is None and data.given is not None:
        source = f", which is from {data.source}" if data.source else ""
        raise NoData(f"say where you have '{name}'{source}: --data {name}=PATH")
    if path is not None and not path.exists():
        raise NoData(f"there is no {path}" if data.path is not None else f"--data {name}={path}: it is not there")
    if path is not None and path.suffix in LINES:
        return _lines(path, shuffle)
    return _rows(_loaded(data, path), str(data), shuffle)


def _lines(path: Path, shuffle: int | None) -> Iterator[Row]:
    try:
        with path.open("rb") as file:
            if shuffle is None:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield _row(path, number, line)
                return
            starts = array("Q")
            position = 0
            for line in file:
                starts.append(position)
                position += len(line)
            for index in Random(shuffle).sample(range(len(starts)), len(starts)):
                file.seek(starts[index])
                if (line := file.readline()).strip():
                    yield _row(path, index + 1, line)
    except OSError as error:
        raise NoData(f"{path}: cannot be read: {error.strerror}") from error


def _row(path: Path, number: int, line: bytes) -> Row:
    place = f"{path}:{number}"
    try:
        columns = json.loads(line)
    except UnicodeDecodeError as error:
        return Row(number, place, problem=f"is not UTF-8: {error.reason}")
    except ValueError as error:
        return Row(number, place, problem=f"not JSON: {error}")
    if not isinstance(columns, dict):
        return Row(number, place, problem=f"not an object with columns, but a {type(columns).__name__}")
    return Row(number, place, columns)


def _rows(dataset: Any, name: str, shuffle: int | None) -> Iterator[Row]:
    order: Any = range(len(dataset))
    if shuffle is not None:
        order = Random(shuffle).sample(order, len(order))
    for index in order:
        yield Row(index, f"{name}, row {index}", dataset[index])


def _loaded(data: Data, path: Path | None) -> Any:
    """The data set at the path, or the Hub's."""
    datasets = extra("datasets")
    told: dict[str, Any] = {"split": data.split or "train"}
    if path is None:
        told |= {"path": data.hub, "name": data.config, "revision": data.revision}
    elif path.is_dir():
        told |= {"path": str(path), "name": data.config}
    else:
        if (kind := KINDS.get(path.suffix)) is None:
            raise NoData(f"{path}: a file of an unknown kind; there are {', '.join((*LINES, *KINDS))}, and folders")
        told = {"path": kind, "data_files": str(path), "split": "train"}
        if path.suffix == ".tsv":
            told["sep"] = "\t"
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(**told)
    except Exception as error:  # a dozen kinds, of three libraries
        slow = path is None and isinstance(error, ConnectionError) and not datasets.config.HF_HUB_OFFLINE
        raise (Unreachable if slow else NoData)(_why(data, path, error)) from error


def _why(data: Data, path: Path | None, error: Exception) -> str:
    told = str(error).strip().splitlines()
    what = f"{data} cannot be read: {type(error).__name__}: {told[0] if told else ''}"
    if data.hub is None or path is not None:
        return what
    revision = f" --revision {data.revision}" if data.revision else ""
    download = f"hf download --repo-type dataset {data.hub}{revision} --local-dir FOLDER"
    return (
        f"{what}\n  To have it without the Hub: `{download}` where there is internet, then `--data {data.hub}=FOLDER`;"
        " or bring that machine's cache along (HF_HOME)."
    )
