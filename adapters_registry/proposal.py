"""What a caller asks to register: a name, where the files come from, and what is known about them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import ConfigDict, Field

from adapters_registry.expert import Frozen, Sample, Text, Visibility

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class HubSource(Frozen):
    """A repository on the Hub; `revision` is a branch, tag or commit, `subfolder` a folder inside it."""

    kind: Literal["hub"] = "hub"
    repo: Text
    revision: Text | None = None
    subfolder: Text | None = None


class FolderSource(Frozen):
    """A PEFT folder on this machine."""

    kind: Literal["folder"] = "folder"
    path: Path


class UploadSource(Frozen):
    """Uploaded files by name, each as bytes, an open binary file, or the path of a received file."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    kind: Literal["upload"] = "upload"
    files: Mapping[str, Annotated[Any, Field(repr=False)]]


Upload = bytes | BinaryIO | Path
Source = Annotated[HubSource | FolderSource | UploadSource, Field(discriminator="kind")]


class Details(Frozen):
    """What is said about an expert; None leaves it open (when registering, to the model card)."""

    description: Annotated[Text, Field(max_length=10_000)] | None = None
    licence: Annotated[Text, Field(max_length=200)] | None = None
    tags: Annotated[tuple[Text, ...], Field(max_length=100)] | None = None
    training_data: Annotated[tuple[Text, ...], Field(max_length=1000)] | None = None
    samples: Annotated[tuple[Sample, ...], Field(max_length=1000)] | None = None


class Proposal(Details):
    """A request to register an adapter.

    `owner` is the caller (None: the operator). `new_version` adds a version to a name that exists already.
    `allow_base_mismatch` accepts an adapter that names another base model, as long as its shapes fit.
    """

    name: str
    source: Source
    samples: Annotated[tuple[Sample, ...], Field(max_length=1000)] = ()
    owner: Text | None = None
    visibility: Visibility = "public"
    new_version: bool = False
    allow_base_mismatch: bool = False
