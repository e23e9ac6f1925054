"""A manifest: the base model and the experts to register, in one YAML file.

    base_model: {name: quickstart, path: base, context: 512, dtype: float32}
    defaults: {licence: Apache-2.0, tags: [demo]}
    experts:
      - name: reverse
        source: experts/reverse            # or hub:org/repo, hub:org/repo@revision, hub:org/repo@revision#subfolder
        samples: samples/reverse.jsonl     # or a list of prompts, or of {prompt, answer}

Folders and files are relative to the manifest. Every mistake is reported, with its file and line.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, ValidationError

from adapters_registry.errors import ManifestError
from adapters_registry.expert import Frozen, Sample, Visibility
from adapters_registry.lines import Unreadable, Where, YamlFile
from adapters_registry.proposal import FolderSource, HubSource, Proposal, Source
from adapters_registry.validate import name_reasons

_HUB = re.compile(r"hub:(?P<repo>[^@#\s]+)(@(?P<revision>[^#\s]+))?(#(?P<subfolder>\S+))?")
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>\S+))?")


class BaseRef(Frozen):
    """The base model to serve: `model` is an absolute folder or a Hub id; `context` is in tokens.

    `dtype` is the type to compute in (vLLM's names), where it matters to the model.
    """

    name: str
    model: str
    revision: str | None = None
    context: int | None = None
    dtype: str | None = None
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    base_model: BaseRef
    proposals: tuple[Proposal, ...]


class _Base(Frozen):
    name: Annotated[str, Field(min_length=1)]
    path: Annotated[str, Field(min_length=1)]
    context: PositiveInt | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    aliases: tuple[str, ...] = ()


class _Defaults(Frozen):
    licence: str | None = None
    tags: tuple[str, ...] = ()
    training_data: tuple[str, ...] | None = None
    visibility: Visibility = "public"
    allow_base_mismatch: bool = False


class _Expert(Frozen):
    name: str
    source: str
    description: str | None = None
    licence: str | None = None
    tags: tuple[str, ...] | None = None
    training_data: tuple[str, ...] | None = None
    samples: str | tuple[str | Sample, ...] = ()
    visibility: Visibility | None = None
    allow_base_mismatch: bool | None = None


class _File(Frozen):
    base_model: _Base
    defaults: _Defaults = _Defaults()
    experts: tuple[_Expert, ...] = ()


def read_manifest(path: Path) -> Manifest:
    """Parse and check a manifest; raises ManifestError with every problem, each as `file:line: field: what`."""
    try:
        file = YamlFile(path)
    except Unreadable as error:
        raise ManifestError([str(error)]) from error
    manifest = parse_manifest(file)
    if manifest is None or file.problems:
        raise ManifestError(file.problems)
    return manifest


def parse_manifest(file: YamlFile, at: Where = ()) -> Manifest | None:
    """The manifest that a file is, or has in a field; None, and more problems in the file, where it is none."""
    content, before = file.content, len(file.problems)
    for part in at:
        content = content[part]
    manifest = _Reader(file, at).read(content)
    return manifest if len(file.problems) == before else None


def parse_source(text: str, relative_to: Path) -> Source:
    """`hub:org/repo@revision#subfolder`, or a folder. Raises ValueError with what would work."""
    if not text.startswith("hub:"):
        return FolderSource(path=(relative_to / Path(text).expanduser()).resolve())
    match = _HUB.fullmatch(text)
    if match is None:
        raise ValueError(f"'{text}' is not a Hub source; write hub:org/repo, optionally @revision and #subfolder")
    return HubSource.model_validate(match.groupdict())


class _Reader:
    """Turns the file's content into proposals, collecting problems with the lines they are on."""

    def __init__(self, file: YamlFile, at: Where) -> None:
        self._file = file
        self._at = at
        self._folder = file.folder
        self._problems = file.problems

    def read(self, content: object) -> Manifest | None:
        try:
            file = _File.model_validate(content)
        except ValidationError as error:
            for each in error.errors():
                self._problem(each["loc"], each["msg"])
            return None
        base = self._base(file.base_model)
        proposals: dict[str, Proposal] = {}
        for index, expert in enumerate(file.experts):
            if expert.name in proposals:
                self._problem(("experts", index, "name"), f"there are two experts called '{expert.name}'")
            elif (proposal := self._proposal(index, expert, file.defaults)) is not None:
                proposals[expert.name] = proposal
        return Manifest(base, tuple(proposals.values()))

    def _base(self, base: _Base) -> BaseRef:
        folder = self._folder / Path(base.path).expanduser()
        match = _HUB_ID.fullmatch(base.path)
        model, revision = str(folder.resolve()), None
        if not folder.is_dir():
            if match is None or base.path.startswith("."):
                message = f"there is no folder {folder}, and '{base.path}' is not a Hub id (org/name)"
                self._problem(("base_model", "path"), message)
            else:
                model, revision = match["repo"], match["revision"]
        return BaseRef(model=model, revision=revision, **base.model_dump(exclude={"path"}))

    def _proposal(self, index: int, expert: _Expert, defaults: _Defaults) -> Proposal | None:
        before = len(self._problems)
        where = ("experts", index)
        for reason in name_reasons(expert.name, ()):
            self._problem((*where, "name"), reason.message)
        samples = self._samples(expert.samples, (*where, "samples"))
        source = None
        try:
            source = parse_source(expert.source, self._folder)
        except ValueError as error:
            self._problem((*where, "source"), str(error))
        if isinstance(source, FolderSource) and not source.path.is_dir():
            self._problem((*where, "source"), f"there is no folder {source.path}")
        if len(self._problems) > before or source is None:
            return None
        tags = (*defaults.tags, *(expert.tags or ()))
        try:
            return Proposal(
                name=expert.name,
                source=source,
                description=expert.description,
                licence=expert.licence or defaults.licence,
                tags=tuple(dict.fromkeys(tags)) or None,
                training_data=defaults.training_data if expert.training_data is None else expert.training_data,
                samples=samples,
                visibility=expert.visibility or defaults.visibility,
                allow_base_mismatch=(
                    defaults.allow_base_mismatch if expert.allow_base_mismatch is None else expert.allow_base_mismatch
                ),
            )
        except ValidationError as error:
            for each in error.errors():
                self._problem((*where, *each["loc"]), each["msg"])
            return None

    def _samples(self, samples: str | tuple[str | Sample, ...], where: Where) -> tuple[Sample, ...]:
        if not isinstance(samples, str):
            found = []
            for index, sample in enumerate(samples):
                if sample == "":
                    self._problem((*where, index), "a sample prompt is empty")
                else:
                    found.append(Sample(prompt=sample) if isinstance(sample, str) else sample)
            return tuple(found)
        file = self._folder / samples
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            self._problem(where, f"cannot read {file}: {getattr(error, 'strerror', None) or error}")
            return ()
        found = []
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    found.append(Sample.model_validate(json.loads(line)))
                except ValidationError as error:
                    for each in error.errors():
                        field = ".".join(str(part) for part in each["loc"]) or "sample"
                        self._problems.append(f"{file}:{number}: {field}: {each['msg']}")
                except ValueError as error:
                    self._problems.append(f"{file}:{number}: not JSON: {error}")
        return tuple(found)

    def _problem(self, where: Where, message: str) -> None:
        self._file.problem((*self._at, *where), message, otherwise="manifest")
