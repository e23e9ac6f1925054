"""Everything that goes wrong in the registry.

RegistryError
├── ExpertNotFound            no such name, or a private one of somebody else
│   └── VersionNotFound       the name exists, that version (or an active one) does not
├── ExpertRefused             an adapter that cannot be registered, with every reason
├── BlendNotFound             no such blend, or one that the caller may not see
├── BlendRefused              a blend that cannot be stored, with every reason
├── BlendUnusable             a stored blend whose members are not what they were
├── NotOwner                  a visible expert or blend that belongs to somebody else
├── InvalidTransition         a change that the version's state does not allow
├── SourceError
│   ├── SourceNotFound        no such repo, revision, file or folder
│   ├── SourceGated           the repo exists and this token may not read it
│   └── SourceUnavailable     offline, no connection, or a download that broke
├── StoreFull                 no space left for the files or the database
├── KeyNotFound               no such API key
├── DecisionNotFound          no such decision, or somebody else's
├── ManifestError             a manifest that does not say what it should, with file and line
├── BaseModelError            the base model's configuration cannot be read
└── RegistryUnusable          a database that does not answer, of a newer release, or of another base model
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class RegistryError(Exception):
    """The root: one `except` catches all of the registry's own errors."""


class ExpertNotFound(RegistryError):
    """`known` are the names that the caller may see, so that the message gives nothing else away."""

    def __init__(self, name: str, known: Iterable[str] = ()) -> None:
        self.name = name
        self.known = tuple(sorted(known))
        super().__init__(f"No expert '{name}'. Registered: {_listing(self.known)}.")


class VersionNotFound(ExpertNotFound):
    """`version` None means that the name has no active version."""

    def __init__(self, name: str, version: int | None, known: Iterable[str] = ()) -> None:
        RegistryError.__init__(self)
        self.name = name
        self.version = version
        self.known = tuple(known)
        wanted = "no active version" if version is None else f"no version {version}"
        self.args = (f"Expert '{name}' has {wanted}. Versions: {_listing(self.known)}.",)


@dataclass(frozen=True)
class Reason:
    """One reason to refuse: a stable code for programs and a sentence for people."""

    code: str
    message: str

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class SameContent(Reason):
    """The very same adapter is registered already, as this version of `expert`."""

    expert: str
    version: int


class ExpertRefused(RegistryError):
    def __init__(self, name: str, reasons: Sequence[Reason]) -> None:
        assert reasons, "a refusal needs a reason"
        self.name = name
        self.reasons = tuple(reasons)
        listed = "".join(f"\n- {reason.message}" for reason in self.reasons)
        super().__init__(f"Expert '{name}' was refused:{listed}")

    @property
    def codes(self) -> frozenset[str]:
        return frozenset(reason.code for reason in self.reasons)


class BlendNotFound(RegistryError):
    """`known` are the names that the caller may see, so that the message gives nothing else away."""

    def __init__(self, reference: str, known: Iterable[str] = ()) -> None:
        self.reference = reference
        super().__init__(f"No blend '{reference}'. Stored: {_listing(sorted(known))}.")


class BlendRefused(RegistryError):
    """`name` is None for a blend that is to have none."""

    def __init__(self, name: str | None, reasons: Sequence[Reason]) -> None:
        assert reasons, "a refusal needs a reason"
        self.reasons = tuple(reasons)
        listed = "".join(f"\n- {reason.message}" for reason in self.reasons)
        which = "The blend" if name is None else f"Blend '{name[:80]}'"
        super().__init__(f"{which} was refused:{listed}")


class BlendUnusable(RegistryError):
    """`problems` are those of a stored blend."""

    def __init__(self, label: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(
            f"Blend '{label}' cannot be used: {'; '.join(problems)}. Store it anew (with replace), or bring back what "
            "it was made of."
        )


class NotOwner(RegistryError):
    def __init__(self, name: str, what: str = "Expert") -> None:
        self.name = name
        super().__init__(f"{what} '{name}' belongs to somebody else; only its owner or the operator may change it.")


class InvalidTransition(RegistryError):
    """A change that the state does not allow; the message says what would work."""


class SourceError(RegistryError):
    """The adapter's files could not be fetched."""


class SourceNotFound(SourceError):
    pass


class SourceGated(SourceError):
    pass


class SourceUnavailable(SourceError):
    pass


class StoreFull(RegistryError):
    def __init__(self, where: object) -> None:
        super().__init__(f"No space left on the device of {where}. Free some space, or remove experts, and try again.")


class KeyNotFound(RegistryError):
    def __init__(self, key_id: str) -> None:
        super().__init__(f"No API key '{key_id}'.")


class DecisionNotFound(RegistryError):
    def __init__(self, decision: str) -> None:
        super().__init__(
            f"There is no decision '{decision:.80}': the router did not make it for you, or it is no longer kept "
            "(feedback.keep, feedback.days). Its id is in the response's header x-moerge-decision-id."
        )


class ManifestError(RegistryError):
    """`problems` are `file:line: field: what is wrong`, one for each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(problems))


class BaseModelError(RegistryError):
    pass


class RegistryUnusable(RegistryError):
    pass


def _listing(names: Sequence[str], most: int = 20) -> str:
    if not names:
        return "none"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
