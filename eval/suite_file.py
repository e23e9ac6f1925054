"""From YAML to a `Suite`, with every problem and the line that it is on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, ValidationError

from adapters_registry.errors import ManifestError
from adapters_registry.lines import Unreadable, YamlFile
from adapters_registry.manifest import Manifest, parse_manifest, read_manifest
from eval.asking import Frozen
from eval.records import EXPERT, REFERENCES, REGIMES, Regime
from eval.suite import BadSuite, RouterEntry, Suite, Task
from eval.suite_routers import routers_of
from eval.suite_tasks import tasks_of


class _File(Frozen):
    """A suite as it is written; tasks and routers are read one by one."""

    name: str
    description: str = ""
    base_model: str | None = None
    manifest: str | dict[str, Any] | None = None
    defaults: dict[str, Any] = Field(default_factory=dict)
    tasks: Annotated[tuple[dict[str, Any], ...], Field(min_length=1)]
    routers: tuple[dict[str, Any], ...] = ()
    regimes: Annotated[tuple[Regime, ...], Field(min_length=1)] = REGIMES
    baseline: str = "best-single"
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    limit: PositiveInt | None = None
    engine: dict[str, Any] = Field(default_factory=dict)
    statistics: tuple[Literal["gram", "fisher"], ...] = ()
    concurrency: PositiveInt = 16
    minutes: float | None = Field(default=None, gt=0)


def read(path: Path, manifest: Path | None = None) -> Suite:
    """Raises BadSuite."""
    try:
        file = YamlFile(path)
    except Unreadable as error:
        raise BadSuite([str(error)]) from error
    return _Reader(file).read(manifest)


class _Reader:
    def __init__(self, file: YamlFile) -> None:
        self._file = file

    def read(self, given: Path | None) -> Suite:
        file = self._written()
        manifest = self._manifest(file, given)
        names = [expert.name for expert in manifest.proposals] if manifest else []
        warnings: list[str] = []
        tasks = tuple(tasks_of(self._file, file.defaults, file.tasks, names))
        routers = tuple(routers_of(self._file, file.routers, names, file.statistics, file.regimes, warnings))
        self._baseline(file, routers, names)
        if manifest is None or self._file.problems:
            raise BadSuite(list(dict.fromkeys(self._file.problems)))
        inline = given is None and isinstance(file.manifest, dict)
        same = file.model_dump(exclude={"base_model", "manifest", "defaults", "tasks", "routers"})
        return Suite(
            path=self._file.path.absolute(),
            manifest=None if inline else given or self._file.folder / Path(str(file.manifest)).expanduser(),
            base_model=manifest.base_model,
            experts=manifest.proposals,
            tasks=tasks,
            routers=routers,
            warnings=(*warnings, *self._unlikely(file, manifest, tasks)),
            **same,
        )

    def _written(self) -> _File:
        try:
            return _File.model_validate(self._file.content)
        except ValidationError as error:
            for each in error.errors():
                self._file.problem(each["loc"], each["msg"], otherwise="suite")
            raise BadSuite(self._file.problems) from error

    def _manifest(self, file: _File, given: Path | None) -> Manifest | None:
        try:
            if given is not None:
                found: Manifest | None = read_manifest(given)
            elif isinstance(file.manifest, dict):
                found = parse_manifest(self._file, ("manifest",))
            elif file.manifest is not None:
                found = read_manifest(self._file.folder / Path(file.manifest).expanduser())
            else:
                message = "the suite comes without experts; give a manifest of yours (`--manifest FILE`, or here)"
                self._file.problem(("manifest",), message)
                return None
        except ManifestError as error:
            self._file.problems += error.problems
            return None
        if found is None:
            return None
        base = found.base_model
        if file.base_model is not None and file.base_model not in (base.name, *base.aliases):
            message = f"the suite is for '{file.base_model}', but the base model of the manifest is '{base.name}'"
            self._file.problem(("base_model",), f"{message}; if they are the same, name it in the manifest's `aliases`")
        if not found.proposals:
            self._file.problem(("manifest",), "it has no experts")
        return found

    def _baseline(self, file: _File, routers: Sequence[RouterEntry], names: Sequence[str]) -> None:
        rows = [*REFERENCES, *(router.name for router in routers)]
        if file.baseline not in rows and file.baseline not in [f"{EXPERT}{name}" for name in names]:
            self._file.problem(("baseline",), f"there is no row '{file.baseline}'; there are: {', '.join(rows)}")

    def _unlikely(self, file: _File, manifest: Manifest, tasks: Sequence[Task]) -> list[str]:
        """What is allowed, but hardly meant."""
        found = []
        names = [expert.name for expert in manifest.proposals]
        owned = {owner for task in tasks for owner in task.owners}
        if all(task.owners or not task.experts for task in tasks):  # else rows say whose they are
            found += [f"{self._file.path}: no task is about the expert '{name}'" for name in names if name not in owned]
        for expert in manifest.proposals:
            if not expert.samples:
                found.append(f"{self._file.path}: the expert '{expert.name}' has no sample prompts to be found by")
        for task in tasks:
            if set(task.owners) >= set(names) and set(file.regimes) - {"in-distribution"}:
                found.append(f"{task.place}: all experts own '{task.name}', so semi-ood and ood leave nobody for it")
        return found
