"""Which checks a staged version must pass before it is promoted."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Literal

from adapters_registry.errors import NotOwner
from adapters_registry.expert import Expert, Frozen, State
from serving.checks.report import KEY, Report, read_report
from serving.config import CheckName, CheckSettings
from serving.errors import ApiError

if TYPE_CHECKING:
    from serving.service import Service

logger = logging.getLogger("moerge")


class Objection(Frozen):
    """What a required check says against a version."""

    code: CheckName
    message: str


class Ruling(Frozen):
    """What the configured policy makes of a report. `passed` says nothing about checks that are not required."""

    passed: bool
    enforce: Literal["never", "warn", "always"]
    required: tuple[CheckName, ...]
    reasons: tuple[Objection, ...]


class CheckRequired(ApiError):
    """A staged version that nobody has checked."""

    status, code = 409, "check_required"


class CheckFailed(ApiError):
    """A staged version that did not pass; `reasons` are what speaks against it."""

    status, code = 409, "check_failed"

    def __init__(self, expert: Expert, reasons: tuple[Objection, ...]) -> None:
        listed = "".join(f"\n- {each.message}" for each in reasons)
        super().__init__(
            f"Version {expert.version} of '{expert.name}' did not pass what checks.require asks for:{listed}\n"
            "Register a better version, or promote it with force.",
            reasons=[(each.code, each.message) for each in reasons],
        )


def ruling(report: Report, settings: CheckSettings) -> Ruling:
    """A required check that could not be measured has not been passed."""
    reasons = []
    for name in settings.require:
        found = report.section(name)
        if found is None or not found.passed:
            detail = found.detail if found else "it was not checked"
            reasons.append(Objection(code=name, message=f"{name}: {detail}"))
    return Ruling(passed=not reasons, enforce=settings.enforce, required=settings.require, reasons=tuple(reasons))


def owned(expert: Expert, tenant: str | None) -> Expert:
    """Reports name whatever the owner may see: they are for the owner and the operator. Raises NotOwner."""
    if tenant is not None and expert.owner != tenant:
        raise NotOwner(expert.name)
    return expert


async def promote(
    service: Service, name: str, version: int, *, tenant: str | None, force: bool
) -> tuple[Expert, tuple[str, ...]]:
    """Make a version the active one; what the policy has against it is given too, when it is promoted all the same.

    Raises as `Registry.promote` does; CheckRequired and CheckFailed when the policy is enforced and not overridden.
    """
    registry, settings = service.registry, service.settings.checks
    against: tuple[str, ...] = ()
    if settings.enforce != "never":
        expert = owned(await asyncio.to_thread(registry.get, name, version, tenant), tenant)
        if expert.state is State.STAGED:
            report = read_report(await asyncio.to_thread(registry.measured.get, expert, KEY))
            error = objection(expert, report, settings)
            if error is not None and settings.enforce == "always" and not force:
                raise error
            against = said_against(error)
    more: dict[str, Any] = {"tenant": tenant, "force": force, "against": against}
    promoted = await asyncio.to_thread(registry.promote, name, version, **more)
    for each in against:
        logger.warning("%s version %d was promoted all the same. %s", name, version, each)
    return promoted, against


def objection(expert: Expert, report: Report | None, settings: CheckSettings) -> CheckRequired | CheckFailed | None:
    if report is None:
        return CheckRequired(
            f"Version {expert.version} of '{expert.name}' has not been checked. Run `moerge expert check {expert.name} "
            f"--version {expert.version}` first, or promote it with force."
        )
    found = ruling(report, settings)
    return None if found.passed else CheckFailed(expert, found.reasons)


def said_against(error: CheckRequired | CheckFailed | None) -> tuple[str, ...]:
    if isinstance(error, CheckFailed):
        return tuple(message for _, message in error.reasons)
    return () if error is None else ("it has not been checked",)
