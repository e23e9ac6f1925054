"""Stored blends: experts merged under a name, or known by their content alone.

A blend pins the versions that it was made of. It can be used while each of them is the active version of its name, and
never means anything else: what is to be made of newer versions is stored anew.
"""

from __future__ import annotations

import builtins
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any

from pydantic import AfterValidator, Field, FiniteFloat
from sqlalchemy import select
from sqlalchemy.orm import Session

from adapters_registry.changes import Changes
from adapters_registry.errors import BlendNotFound, BlendRefused, ExpertNotFound, NotOwner, Reason
from adapters_registry.expert import Frozen, State, Text, Visibility
from adapters_registry.licences import LicenceNote, strictest_first
from adapters_registry.models import BlendRow, ExpertRow, VersionRow, now
from adapters_registry.proposal import NAME
from adapters_registry.validate import name_reasons

#: Members of one blend.
MOST_MEMBERS = 64
#: Bytes that each of `settings`, `report` and `search` may take as JSON.
MOST_JSON = 64 * 1024
#: No name begins so: a blend by its content.
PREFIX = "blend:"
_BY_CONTENT = re.compile(r"blend:([0-9a-f]{12}|[0-9a-f]{64})")


def _small(value: dict[str, Any]) -> dict[str, Any]:
    try:
        size = len(json.dumps(value, allow_nan=False))
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if size > MOST_JSON:
        raise ValueError(f"takes {size:,} bytes as JSON, more than {MOST_JSON:,}")
    return value


Json = Annotated[dict[str, Any], AfterValidator(_small)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class BlendMember(Frozen):
    """An expert's version in a blend, pinned by its content."""

    expert: str
    version: int = Field(ge=1)
    digest: Digest
    weight: FiniteFloat

    @property
    def id(self) -> str:
        return f"{self.expert}@{self.digest[:12]}"


class Ingredient(Frozen):
    """What a caller named: an expert or a blend, by the name it was called by, its id, and its weight."""

    name: str
    id: str
    weight: FiniteFloat


class NewBlend(Frozen):
    """What is to be stored.

    name      None: the blend is known by its content alone
    digest    sha256 (hex) of all that decides its content
    members   experts, each once, at their active versions
    settings  of the operator: JSON that the registry only keeps, like `report` (what became of it) and `search` (how
              its weights were found; {}: they were given)
    lineage   what the caller made it of, with blends that are not taken apart
    """

    name: str | None = None
    digest: Digest
    members: tuple[BlendMember, ...]
    operator: Text
    settings: Json = Field(default_factory=dict)
    owner: Text | None = None
    visibility: Visibility = "public"
    description: Annotated[Text, Field(max_length=10_000)] = ""
    report: Json = Field(default_factory=dict)
    search: Json = Field(default_factory=dict)
    lineage: Annotated[tuple[Ingredient, ...], Field(max_length=MOST_MEMBERS)] = ()

    @property
    def id(self) -> str:
        return f"{PREFIX}{self.digest[:12]}"

    @property
    def label(self) -> str:
        return self.name or self.id


class Blend(NewBlend):
    """A stored blend, as whoever looked it up may know it.

    visibility  private also while a member is
    licences    of the members, the strictest first
    problems    why it cannot be used now; none: it can
    """

    created_at: datetime
    licences: tuple[LicenceNote, ...] = ()
    problems: tuple[str, ...] = ()

    def visible_to(self, tenant: str | None) -> bool:
        return self.visibility == "public" or tenant is None or tenant == self.owner


@dataclass(frozen=True)
class _Version:
    number: int
    digest: str
    state: str
    licence: str | None


@dataclass(frozen=True)
class _Expert:
    """A member's name as it stands now."""

    name: str
    owner: str | None
    visibility: str
    versions: builtins.list[_Version] = field(default_factory=list)

    def visible_to(self, tenant: str | None) -> bool:
        return self.visibility == "public" or tenant is None or tenant == self.owner

    @property
    def active(self) -> _Version | None:
        return next((each for each in self.versions if each.state == State.ACTIVE), None)

    def pinned(self, member: BlendMember) -> _Version | None:
        """The version with this content, the active one first."""
        same = [each for each in self.versions if each.digest == member.digest]
        return max(same, key=lambda each: each.state == State.ACTIVE, default=None)


_Experts = Mapping[str, _Expert]


class Blends:
    """The blends in the registry's database; `reserved` are names that none may take."""

    def __init__(self, changes: Changes, reserved: Collection[str]) -> None:
        self._changes = changes
        self._reserved = reserved

    # Reading

    def list(self, tenant: str | None = None) -> builtins.list[Blend]:
        """All that the tenant may see: those with a name by name, then the others, oldest first."""
        with self._changes.session() as session:
            found = _visible(session, session.scalars(select(BlendRow).order_by(BlendRow.id)), tenant)
        return sorted(found, key=lambda each: (each.name is None, each.name or ""))

    def get(self, reference: str, tenant: str | None = None) -> Blend:
        """A blend by name, or by content as `blend:<digest>` (12 digits of it, or all).

        One content may be stored several times: then the tenant's own counts before others, and one without a name
        before those that have one. Raises BlendNotFound, also for a blend that the tenant may not see.
        """
        with self._changes.session() as session:
            return _find(session, reference, tenant)[1]

    # Changing

    def against(self, new: NewBlend, *, replace: bool = False) -> builtins.list[Reason]:
        """Every reason of the registry's not to store this blend now."""
        with self._changes.session() as session:
            old = _namesake(session, new)
            return list(self._against(session, new, old, _experts(session, new.members), replace))

    def create(self, new: NewBlend, *, replace: bool = False) -> Blend:
        """Store a blend, or with `replace` put it in the place of its owner's blend of that name.

        It is private when one of its members is. One without a name takes the place of its owner's other one of the
        same content. Raises BlendRefused with every reason.
        """
        with self._changes.change(new.owner) as change:
            session = change.session
            old = _namesake(session, new)
            experts = _experts(session, new.members)
            if reasons := list(self._against(session, new, old, experts, replace)):
                raise BlendRefused(new.name, reasons)
            row = old or BlendRow(owner=new.owner)
            private = any(experts[each.expert].visibility == "private" for each in new.members)
            values = new.model_dump(mode="json", exclude={"owner"})
            values["visibility"] = "private" if private else new.visibility
            if any(getattr(row, key) != value for key, value in values.items()):
                for key, value in values.items():
                    setattr(row, key, value)
                row.created_at = now()
                session.add(row)
                action = "create_blend" if old is None else "replace_blend"
                change.record(action, new.label, digest=new.digest, members=[each.id for each in new.members])
                session.flush()
            return _blend(row, experts, new.owner)

    def remove(self, reference: str, *, tenant: str | None = None) -> Blend:
        """Forget a blend, found as `get` finds it, and return what it was. Raises BlendNotFound, NotOwner."""
        with self._changes.change(tenant) as change:
            row, blend = _find(change.session, reference, tenant)
            if tenant is not None and row.owner != tenant:
                raise NotOwner(blend.label, "Blend")
            change.record("remove_blend", blend.label, digest=blend.digest)
            change.session.delete(row)
            return blend

    def _against(
        self, session: Session, new: NewBlend, old: BlendRow | None, experts: _Experts, replace: bool
    ) -> Iterator[Reason]:
        if new.name is not None:
            yield from name_reasons(new.name, self._reserved) or _against_name(session, new, old, replace)
        if not 1 <= len(new.members) <= MOST_MEMBERS:
            yield Reason("wrong_members", f"A blend has 1 to {MOST_MEMBERS} members, not {len(new.members)}.")
        if len({each.expert for each in new.members}) < len(new.members):
            yield Reason("wrong_members", "An expert is a member twice; add its weights up.")
        yield from _against_members(session, new, new.owner if old is None else old.owner, experts)


def taken_by_a_blend(session: Session, name: str) -> Iterator[Reason]:
    """Experts and blends share one space of names."""
    if session.scalar(select(BlendRow.id).where(BlendRow.name == name)) is not None:
        yield Reason("name_taken", f"The name '{name}' is already taken, by a blend. Choose another name.")


def _against_name(session: Session, new: NewBlend, old: BlendRow | None, replace: bool) -> Iterator[Reason]:
    if session.scalar(select(ExpertRow.id).where(ExpertRow.name == new.name)) is not None:
        yield Reason("name_taken", f"The name '{new.name}' is already taken, by an expert. Choose another name.")
    elif old is not None:
        owns = new.owner is None or new.owner == old.owner
        if not (owns and replace):
            advice = "Choose another name" + (", or pass replace to store this one in its place." if owns else ".")
            yield Reason("name_taken", f"The name '{new.name}' is already taken. {advice}")


def _against_members(session: Session, new: NewBlend, owner: str | None, experts: _Experts) -> Iterator[Reason]:
    """`owner` is who will have the blend; what only others may see does not exist."""
    known: builtins.list[str] | None = None
    private = {experts[each.expert].owner for each in new.members if _is_private(experts.get(each.expert))}
    for member in new.members:
        expert = experts.get(member.expert)
        if expert is None or not expert.visible_to(owner):
            if known is None:
                known = [row.name for row in session.scalars(select(ExpertRow)) if row.visible_to(owner)]
            yield Reason("unknown_member", str(ExpertNotFound(member.expert, known=known)))
        elif problem := _problem(member, experts):
            yield Reason("member_inactive", f"Only active versions are blended: {problem}.")
    if owner is None and len(private) > 1:
        yield Reason("other_owners", "Its members are private to different owners, so nobody could be given the blend.")


def _is_private(expert: _Expert | None) -> bool:
    return expert is not None and expert.visibility == "private"


def _namesake(session: Session, new: NewBlend) -> BlendRow | None:
    """What it would take the place of."""
    if new.name is not None and not NAME.fullmatch(new.name):
        return None
    query = select(BlendRow).where(BlendRow.name == new.name)  # None: IS NULL
    if new.name is None:
        query = query.where(BlendRow.digest == new.digest, BlendRow.owner == new.owner)
    return session.scalars(query.order_by(BlendRow.id)).first()


def _find(session: Session, reference: str, tenant: str | None) -> tuple[BlendRow, Blend]:
    content = _BY_CONTENT.fullmatch(reference)
    rows: Sequence[BlendRow] = ()
    if content or NAME.fullmatch(reference):
        where = BlendRow.digest.startswith(content[1]) if content else BlendRow.name == reference
        rows = session.scalars(select(BlendRow).where(where).order_by(BlendRow.id)).all()
    experts = _experts(session, _members(rows))
    for row in sorted(rows, key=lambda row: (row.owner != tenant, row.name is not None)):
        if _is_visible(row, experts, tenant):
            return row, _blend(row, experts, tenant)
    named = session.scalars(select(BlendRow).where(BlendRow.name.is_not(None)))
    raise BlendNotFound(reference, known=[each.label for each in _visible(session, named, tenant)])


def _visible(session: Session, rows: Iterable[BlendRow], tenant: str | None) -> builtins.list[Blend]:
    rows = builtins.list(rows)
    experts = _experts(session, _members(rows))
    return [_blend(row, experts, tenant) for row in rows if _is_visible(row, experts, tenant)]


def _members(rows: Iterable[BlendRow]) -> builtins.list[BlendMember]:
    return [BlendMember(**each) for row in rows for each in row.members]


def _experts(session: Session, members: Iterable[BlendMember]) -> _Experts:
    """What stands behind the members' names now; names that are gone are missing."""
    names = {each.expert for each in members if NAME.fullmatch(each.expert)}
    query = (
        select(
            ExpertRow.name,
            ExpertRow.owner,
            ExpertRow.visibility,
            VersionRow.number,
            VersionRow.digest,
            VersionRow.state,
            VersionRow.licence,
        )
        .join(VersionRow.expert)
        .where(ExpertRow.name.in_(names))
        .order_by(VersionRow.number)
    )
    found: dict[str, _Expert] = {}
    for name, owner, visibility, number, digest, state, licence in session.execute(query):
        expert = found.setdefault(name, _Expert(name, owner, visibility))
        expert.versions.append(_Version(number, digest, state, licence))
    return found


def _is_visible(row: BlendRow, experts: _Experts, tenant: str | None) -> bool:
    """To its owner and the operator; to others while neither it nor a member is private."""
    if tenant is None or tenant == row.owner:
        return True
    return row.visibility == "public" and not any(_is_private(experts.get(each["expert"])) for each in row.members)


def _blend(row: BlendRow, experts: _Experts, tenant: str | None) -> Blend:
    members = _members([row])
    seen = {name: expert for name, expert in experts.items() if expert.visible_to(tenant)}
    private = row.visibility == "private" or any(_is_private(seen.get(each.expert)) for each in members)
    return Blend.model_validate(
        {
            **{name: getattr(row, name) for name in NewBlend.model_fields},
            "members": members,
            "visibility": "private" if private else "public",
            "created_at": row.created_at,
            "licences": strictest_first((each.expert, _licence(each, seen)) for each in members),
            "problems": [problem for each in members if (problem := _problem(each, seen))],
        }
    )


def _licence(member: BlendMember, experts: _Experts) -> str | None:
    expert = experts.get(member.expert)
    version = None if expert is None else expert.pinned(member)
    return None if version is None else version.licence


def _problem(member: BlendMember, seen: _Experts) -> str | None:
    """Why a member keeps a blend from being used, to somebody who sees these experts."""
    expert = seen.get(member.expert)
    if expert is None:
        return f"its member '{member.expert}' is not registered any more"
    version = expert.pinned(member)
    if version is None:
        return f"version {member.version} of its member '{member.expert}' is not registered any more"
    if version.state == State.ACTIVE:
        return None
    which = f"version {version.number} of its member '{member.expert}'"
    if version.state == State.RETIRED and expert.active is not None:
        return f"{which} has given way to version {expert.active.number}"
    return f"{which} is {version.state}"
