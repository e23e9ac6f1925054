"""The routers of a suite's file: methods, blends and their settings checked before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from adapters_registry.lines import Where, YamlFile
from eval.expanding import expansions, filled
from eval.records import EXPERT, REFERENCES, Regime
from eval.suite import Blend, RouterEntry
from eval.templates import BadTemplate
from router.blending import OPERATORS
from router.blending.errors import BlendError
from router.blending.operators import operator_of
from router.methods import METHODS
from router.methods.gated import TRAINED, GatedSettings, gate_type
from router.mixture import MixtureSettings


def routers_of(
    file: YamlFile,
    entries: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    statistics: Sequence[str],
    regimes: Sequence[Regime],
    warnings: list[str],
) -> Iterator[RouterEntry]:
    """`names` are the experts; none: they could not be read. Problems are added to the file's."""
    seen: set[str] = set()
    for index, told in enumerate(entries):
        reader = _Entry(file, ("routers", index), names, statistics, warnings)
        rest = {key: value for key, value in told.items() if key != "each"}
        for each in expansions(file, told.get("each"), ("routers", index)):
            entry = reader.router(rest, each)
            if entry is None:
                continue
            if entry.name in REFERENCES or entry.name.startswith(EXPERT):
                reader.problem(("name",), f"'{entry.name}' is a row that every run has; call it something else")
            if entry.name in seen:
                reader.problem(("name",), f"there are two routers called '{entry.name}'")
            if entry.model is not None and "in-distribution" not in regimes:
                reader.problem(
                    ("model",), "an endpoint is only asked in-distribution, which is no regime of this suite"
                )
            seen.add(entry.name)
            yield entry


T = TypeVar("T", bound=BaseModel)


class _Entry:
    def __init__(
        self, file: YamlFile, where: Where, names: Sequence[str], statistics: Sequence[str], warnings: list[str]
    ) -> None:
        self._file = file
        self._where = where
        self._names = names
        self._statistics = statistics
        self._warnings = warnings

    def router(self, told: Mapping[str, Any], each: str | None) -> RouterEntry | None:
        try:
            entry = self._validated(RouterEntry, filled(told, each), ())
        except BadTemplate as error:
            self.problem((), str(error))
            return None
        if entry is None:
            return None
        family, about = "endpoint", ""
        if entry.method is not None:
            family, about = self._method(entry.method, entry.settings)
        elif entry.blend is not None:
            family, about = self._blend(entry.blend)
        return entry.model_copy(update={"family": entry.family or family, "about": entry.about or about})

    def _method(self, name: str, told: Mapping[str, Any]) -> tuple[str, str]:
        """Its family, and what it computes."""
        if name not in METHODS:
            self.problem(("method",), f"there is no routing method '{name}'; there are: {', '.join(METHODS)}")
            return "", ""
        kind, gate = METHODS[name].Settings, told.get("gate", {})
        gates = issubclass(kind, GatedSettings) and isinstance(gate, dict)
        if gates and self._validated(gate_type(name).Settings, gate, ("settings", "gate")) is None:
            told = {key: value for key, value in told.items() if key != "gate"}
        settings = self._validated(kind, told, ("settings",))
        if name in TRAINED:
            self._warn(f"{name} needs experts with trained vectors (moerge gates train)")
        if isinstance(settings, GatedSettings):
            self._known((*settings.group, *filter(None, [settings.general])), ("settings",))
            return "gate", gate_type(name).equation.replace("`", "")
        if isinstance(settings, MixtureSettings) and settings.top_k > 1:
            self._measured(settings.operator)
            return "mixture" if settings.operator == "cat" else "operator", OPERATORS[settings.operator].formula
        return "selection", ""

    def _blend(self, blend: Blend) -> tuple[str, str]:
        """Its family, and what it computes."""
        try:
            operator_of(blend.operator, blend.settings)
        except BlendError as error:
            for reason in error.reasons:
                self.problem(("blend",), reason)
            return "", ""
        if blend.experts != "all":
            self._known(tuple(blend.experts), ("blend", "experts"))
            if not blend.experts:
                self.problem(("blend", "experts"), "names nobody; write `all`, or leave it out")
        self._measured(blend.operator)
        return "blend", OPERATORS[blend.operator].formula

    def _known(self, experts: Sequence[str], field: Where) -> None:
        for expert in experts:
            if self._names and expert not in self._names:
                self.problem(field, f"there is no expert '{expert}'; there are: {', '.join(self._names)}")

    def _measured(self, operator: str) -> None:
        needed = OPERATORS[operator].statistic
        if needed is not None and needed not in self._statistics:
            self._warn(f"{operator} needs the experts' {needed} statistics; write `statistics: [{needed}]`")

    def _warn(self, message: str) -> None:
        self._warnings.append(f"{self._file.place(self._where)}: {message}")

    def problem(self, field: Where, message: str) -> None:
        self._file.problem((*self._where, *field), message)

    def _validated(self, kind: type[T], told: Mapping[str, Any], field: Where) -> T | None:
        try:
            return kind.model_validate(dict(told))
        except ValidationError as error:
            for each in error.errors():
                self.problem((*field, *each["loc"]), each["msg"].removeprefix("Value error, "))
            return None
