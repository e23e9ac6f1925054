"""The registry: which experts exist, in which versions, and every change to that.

Synchronous and safe to call from many threads and processes. Every change is one transaction that first increments
the generation counter; that row puts the writers in a line, so what a change checks cannot become untrue before it
commits. Adapter files are in place before the row that mentions them, and leave after it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike
from sqlalchemy import Engine, func, select
from sqlalchemy.orm import Session

from adapters_registry.base import BaseSpec
from adapters_registry.blends import Blends, taken_by_a_blend
from adapters_registry.card import Card, read_card
from adapters_registry.changes import Changes
from adapters_registry.database import open_database
from adapters_registry.errors import (
    ExpertNotFound,
    ExpertRefused,
    InvalidTransition,
    NotOwner,
    Reason,
    RegistryUnusable,
    SameContent,
    VersionNotFound,
)
from adapters_registry.expert import Check, Expert, Frozen, Sample, State, Visibility
from adapters_registry.feedback import Decisions
from adapters_registry.hub import Hub
from adapters_registry.keys import ApiKeys
from adapters_registry.lora import CARD
from adapters_registry.measured import Measured
from adapters_registry.models import EventRow, ExpertRow, GenerationRow, PrototypeRow, TensorsRow, VersionRow
from adapters_registry.proposal import Details, Proposal
from adapters_registry.sources import Progress, fetch
from adapters_registry.store import Staged, Store
from adapters_registry.tensors import FloatArray, pack, unpack
from adapters_registry.validate import AdapterInfo, Limits, examine, name_reasons

RESERVED = ("auto",)


class Event(Frozen):
    """One change, as recorded: `actor` None is the operator."""

    at: datetime
    generation: int
    actor: str | None
    action: str
    expert: str
    version: int | None
    detail: dict[str, Any]


class Prepared:
    """A validated adapter whose files are in the store and which no name points to yet.

    A context manager: leaving it without `Registry.commit` takes the files away again, unless another version
    has the same content. `expert` is what will be registered, staged, under the next free version number.
    """

    def __init__(self, expert: Expert, proposal: Proposal, staged: Staged, discard: Callable[[str], object]) -> None:
        self.expert = expert
        self.proposal = proposal
        self._staged = staged
        self._discard = discard

    def close(self) -> None:
        self._staged.close()
        self._discard(self.expert.digest)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Registry:
    """The experts for one base model. Open it with `Registry.open`."""

    def __init__(
        self,
        engine: Engine,
        data_dir: Path,
        *,
        base: BaseSpec,
        limits: Limits,
        hub: Hub,
        reserved: Collection[str] = (),
    ) -> None:
        self._engine = engine
        self._data_dir = data_dir
        self._changes = Changes(engine, data_dir)
        self._hub = hub
        self._reserved = frozenset({*RESERVED, base.name, *reserved})
        self.base = base
        self.limits = limits
        self.store = Store(data_dir / "adapters")
        self.keys = ApiKeys(engine, data_dir)
        self.decisions = Decisions(engine, data_dir)
        self.blends = Blends(self._changes, self._reserved)
        self.measured = Measured(self._changes)

    @classmethod
    def open(
        cls,
        data_dir: Path,
        *,
        url: str | None = None,
        base: BaseSpec,
        limits: Limits | None = None,
        hub: Hub | None = None,
        reserved: Collection[str] = (),
    ) -> Self:
        """Open (and create, migrate, recover) the registry in `data_dir`.

        `url` is a database URL instead of SQLite in that folder; the adapter files are always in the folder, which
        processes with one database share. `reserved` are further names that no expert may take.
        Raises RegistryUnusable, StoreFull.
        """
        engine = open_database(data_dir, url)
        registry = cls(engine, data_dir, base=base, limits=limits or Limits(), hub=hub or Hub(), reserved=reserved)
        try:
            registry._refuse_other_base()
            registry.recover()
        except BaseException:
            engine.dispose()
            raise
        return registry

    def close(self) -> None:
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def recover(self) -> list[str]:
        """Clean up after registrations that died half-way; returns the digests removed. Runs at `open`."""
        return self.collect()

    # Reading

    def generation(self) -> int:
        """A number that grows with every change."""
        with self._changes.session() as session:
            return session.scalars(select(GenerationRow.value)).one()

    def experts(self, tenant: str | None = None, states: Collection[State] = (State.ACTIVE,)) -> list[Expert]:
        """All versions in these states that the tenant may see, by name and version."""
        query = (
            select(VersionRow)
            .join(VersionRow.expert)
            .where(VersionRow.state.in_([str(state) for state in states]))
            .order_by(ExpertRow.name, VersionRow.number)
        )
        with self._changes.session() as session:
            found = [self._expert(row) for row in session.scalars(query)]
        return [expert for expert in found if expert.visible_to(tenant)]

    def get(self, name: str, version: int | None = None, tenant: str | None = None) -> Expert:
        """One version, by default the active one.

        Raises ExpertNotFound, also for another tenant's private expert; VersionNotFound.
        """
        with self._changes.session() as session:
            return self._expert(self._version(self._row(session, name, tenant), version))

    def versions(self, name: str, tenant: str | None = None) -> list[Expert]:
        """Every version of a name, oldest first. Raises ExpertNotFound."""
        with self._changes.session() as session:
            return [self._expert(row) for row in self._row(session, name, tenant).versions]

    def events(self, name: str | None = None) -> list[Event]:
        """What was changed, when and by whom, oldest first."""
        query = select(EventRow).order_by(EventRow.id)
        if name is not None:
            query = query.where(EventRow.expert == name)
        fields = tuple(Event.model_fields)
        with self._changes.session() as session:
            return [Event(**{field: getattr(row, field) for field in fields}) for row in session.scalars(query)]

    # Registering

    def prepare(self, proposal: Proposal, progress: Progress | None = None) -> Prepared:
        """Fetch and check an adapter and put its files in the store; nothing is registered yet.

        `progress(stage, fraction)` is told of the stages `fetch`, `validate` and `store`.
        Raises ExpertRefused with every reason at once; SourceError; StoreFull.
        """
        tell = progress or (lambda stage, fraction: None)
        with self.store.stage() as staged:
            tell("fetch", 0.0)
            fetched = fetch(proposal.source, staged, self.limits, self._hub, tell)
            tell("fetch", 1.0)
            info, against = examine(
                staged.path,
                self.base,
                self.limits,
                allow_base_mismatch=proposal.allow_base_mismatch,
                refused=fetched.refused,
            )
            reasons = [*name_reasons(proposal.name, self._reserved), *fetched.reasons, *against]
            with self._changes.session() as session:
                row = self._find(session, proposal.name)
                reasons += self._name_taken(session, row, proposal)
                if info is not None:
                    reasons += self._content_taken(session, proposal, staged.digest)
            if info is None or reasons:
                raise ExpertRefused(proposal.name, reasons)
            tell("validate", 1.0)
            number = row.last_version + 1 if row else 1
            expert = self._describe(
                proposal, info, read_card(staged.path / CARD), fetched.origin, staged.digest, number
            )
            tell("store", 0.0)
            staged.publish()
            return Prepared(expert, proposal, staged.outlive(), self._discard)

    def commit(
        self,
        prepared: Prepared,
        *,
        state: State,
        checks: Sequence[Check] = (),
        reasons: Sequence[str] = (),
        prototypes: Mapping[str, ArrayLike] | None = None,
    ) -> Expert:
        """Register it: staged, active or quarantined, in one transaction; an active one retires its predecessor.

        `prototypes` are (rows, columns) float32 matrices by encoder id. `reasons` say why it is quarantined.
        Raises ExpertRefused when somebody else took the name or registered the content meanwhile.
        """
        if state is State.RETIRED:
            raise InvalidTransition("A new version is registered as staged, active or quarantined, not as retired.")
        proposal, expert = prepared.proposal, prepared.expert
        matrices = {encoder: _matrix(values) for encoder, values in (prototypes or {}).items()}
        with self._changes.change(proposal.owner) as change:
            session = change.session
            row = self._find(session, expert.name)
            against = self._name_taken(session, row, proposal) + self._content_taken(session, proposal, expert.digest)
            if against:
                raise ExpertRefused(expert.name, against)
            if row is None:
                row = ExpertRow(
                    name=expert.name,
                    owner=expert.owner,
                    visibility=expert.visibility,
                    last_version=0,
                    versions=[],
                )
                session.add(row)
            row.last_version += 1
            version = VersionRow(
                number=row.last_version,
                state=State.STAGED,
                checks=[check.model_dump() for check in checks],
                reasons=list(reasons),
                base_model=expert.base_model,
                rank=expert.rank,
                digest=expert.digest,
                target_modules=list(expert.target_modules),
                source=expert.source,
                description=expert.description,
                licence=expert.licence,
                tags=list(expert.tags),
                training_data=list(expert.training_data),
                samples=[sample.model_dump() for sample in expert.samples],
                prototypes=[_prototype_row(encoder, matrix) for encoder, matrix in matrices.items()],
            )
            row.versions.append(version)
            session.flush()
            change.enter(version, state)
            change.record("register", expert.name, version.number, state=state, digest=expert.digest)
            return self._expert(version)

    # Changing

    def promote(
        self,
        name: str,
        version: int,
        *,
        tenant: str | None = None,
        force: bool = False,
        against: Sequence[str] = (),
    ) -> Expert:
        """Make a staged or retired version the active one; with `force` also a quarantined one.

        `against` is what was known to speak against it, for the event.
        Raises ExpertNotFound, VersionNotFound, NotOwner, InvalidTransition.
        """
        with self._changes.change(tenant) as change:
            row = self._version(self._owned(change.session, name, tenant), version)
            if row.state == State.QUARANTINED and not force:
                raise InvalidTransition(
                    f"Version {version} of '{name}' is quarantined: {'; '.join(row.reasons) or 'no reason given'}. "
                    "Register a better version, or promote it with force."
                )
            if row.state != State.ACTIVE:
                change.enter(row, State.ACTIVE)
                told = {"forced": force, "against": list(against)} if force or against else {}
                change.record("promote", name, row.number, **told)
            return self._expert(row)

    def rollback(self, name: str, *, tenant: str | None = None) -> Expert:
        """Return to the version that was active before the present one, or to the last active one when none is.

        Rolling back twice is back at the start. Raises InvalidTransition when there is nothing to return to.
        """
        with self._changes.change(tenant) as change:
            rows = self._owned(change.session, name, tenant).versions
            earlier = [row for row in rows if row.activated and row.state == State.RETIRED]
            if not earlier:
                raise InvalidTransition(f"No version of '{name}' was active before. Promote one by its number.")
            row = max(earlier, key=lambda each: each.activated)
            change.enter(row, State.ACTIVE)
            change.record("rollback", name, row.number)
            return self._expert(row)

    def retire(self, name: str, *, tenant: str | None = None) -> Expert:
        """Take the active version out of service; `promote` or `rollback` bring it back. Raises VersionNotFound."""
        with self._changes.change(tenant) as change:
            row = self._version(self._owned(change.session, name, tenant), None)
            change.enter(row, State.RETIRED)
            change.record("retire", name, row.number)
            return self._expert(row)

    def quarantine(
        self,
        name: str,
        version: int,
        reasons: Sequence[str],
        *,
        checks: Sequence[Check] | None = None,
        tenant: str | None = None,
    ) -> Expert:
        """Take a version out of service because something is wrong with it; `checks` replace those on record."""
        with self._changes.change(tenant) as change:
            row = self._version(self._owned(change.session, name, tenant), version)
            row.reasons = list(reasons)
            if checks is not None:
                row.checks = [check.model_dump() for check in checks]
            change.enter(row, State.QUARANTINED)
            change.record("quarantine", name, row.number, reasons=list(reasons))
            return self._expert(row)

    def update(
        self,
        name: str,
        *,
        version: int | None = None,
        description: str | None = None,
        licence: str | None = None,
        tags: Sequence[str] | None = None,
        training_data: Sequence[str] | None = None,
        samples: Sequence[Sample] | None = None,
        visibility: Visibility | None = None,
        tenant: str | None = None,
    ) -> Expert:
        """Change what is said about a version (by default the active one); None leaves a field as it is.

        Visibility belongs to the name, so it changes for all versions. New samples, or a new description, make the
        version's prototypes stale: they are dropped, to be computed again. Raises as `get` does, NotOwner, and
        ValueError for text that cannot be stored.
        """
        details = Details.model_validate(
            {
                "description": description,
                "licence": licence,
                "tags": tags,
                "training_data": training_data,
                "samples": samples,
            }
        )
        wanted = {key: value for key, value in details.model_dump(mode="json").items() if value is not None}
        with self._changes.change(tenant) as change:
            row = self._version(self._owned(change.session, name, tenant), version)
            changed = {key: value for key, value in wanted.items() if value != getattr(row, key)}
            for key, value in changed.items():
                setattr(row, key, value)
            if visibility not in (None, row.expert.visibility):
                row.expert.visibility = changed["visibility"] = visibility
            if {"samples", "description"} & changed.keys():
                row.prototypes.clear()
            if changed:
                change.record("update", name, row.number, fields=sorted(changed))
            return self._expert(row)

    def remove(self, name: str, version: int | None = None, *, tenant: str | None = None) -> None:
        """Forget a version, or the name with all its versions. The files stay until `collect`.

        Raises ExpertNotFound, VersionNotFound, NotOwner.
        """
        with self._changes.change(tenant) as change:
            expert = self._owned(change.session, name, tenant)
            if version is None:
                change.record("remove", name)
                change.session.delete(expert)
                return
            row = self._version(expert, version)
            change.record("remove", name, row.number)
            if len(expert.versions) == 1:
                change.session.delete(expert)
            else:
                expert.versions.remove(row)

    def collect(self, in_use: Collection[str] = ()) -> list[str]:
        """Delete the files of contents that no version has, except those `in_use`; returns the digests deleted."""
        return self.store.collect(lambda digest: digest in in_use or self._referenced(digest))

    # Prototypes

    def prototypes(self, encoder: str, ids: Collection[str] | None = None) -> dict[str, FloatArray]:
        """(rows, columns) float32 by expert id, for the active versions or for those `ids`.

        An expert whose prototypes this encoder has not computed yet is missing from the result.
        """
        query = select(PrototypeRow, VersionRow).join(VersionRow, PrototypeRow.version_id == VersionRow.id)
        query = query.where(PrototypeRow.encoder == encoder)
        if ids is None:
            query = query.where(VersionRow.state == State.ACTIVE)
        with self._changes.session() as session:
            found = {self._expert(version).id: _array(prototype) for prototype, version in session.execute(query)}
        return found if ids is None else {key: found[key] for key in ids if key in found}

    def set_prototypes(self, name: str, version: int, encoder: str, prototypes: ArrayLike) -> None:
        """Keep a version's prototypes. Writing what is there already changes nothing, the generation included."""
        new = _prototype_row(encoder, _matrix(prototypes))
        with self._changes.session() as session:
            row = self._version(self._row(session, name, None), version)
            old = session.get(PrototypeRow, (row.id, encoder))
            if old is not None and (old.rows, old.columns, old.data) == (new.rows, new.columns, new.data):
                return
        with self._changes.change(None) as change:
            new.version_id = self._version(self._row(change.session, name, None), version).id
            change.session.merge(new)
            change.record("prototypes", name, version, encoder=encoder)

    # Tensors

    def tensors(
        self, name: str, version: int | None, key: str, tenant: str | None = None
    ) -> dict[str, FloatArray] | None:
        """What is kept with a version (None: the active one) under a key, by tensor name; None when nothing is.

        Raises ExpertNotFound, VersionNotFound.
        """
        with self._changes.session() as session:
            row = self._version(self._row(session, name, tenant), version)
            kept = session.get(TensorsRow, (row.id, key))
            return None if kept is None else unpack(kept.data)

    def tensor_keys(self, name: str, version: int | None = None, tenant: str | None = None) -> list[str]:
        """The keys under which a version (by default the active one) keeps tensors, sorted."""
        with self._changes.session() as session:
            row = self._version(self._row(session, name, tenant), version)
            query = select(TensorsRow.key).where(TensorsRow.version_id == row.id)
            return sorted(session.scalars(query))

    def set_tensors(
        self, name: str, version: int | None, key: str, tensors: Mapping[str, ArrayLike], *, tenant: str | None = None
    ) -> None:
        """Keep float32 tensors with a version under a key, in place of those there; all of them or none.

        Writing what is there already changes nothing, the generation included. They go with their version.
        Raises as `get` does, NotOwner, and ValueError for what cannot be stored (`adapters_registry.tensors`).
        """
        data = pack(key, tensors)
        with self._changes.change(tenant) as change:
            session = change.session
            row = self._version(self._owned(session, name, tenant), version)
            kept = session.get(TensorsRow, (row.id, key))
            if kept is None or kept.data != data:
                session.merge(TensorsRow(version_id=row.id, key=key, data=data))
                change.record("tensors", name, row.number, key=key, tensors=len(tensors))

    # Inside

    def _find(self, session: Session, name: str) -> ExpertRow | None:
        return session.scalars(select(ExpertRow).where(ExpertRow.name == name)).one_or_none()

    def _row(self, session: Session, name: str, tenant: str | None) -> ExpertRow:
        row = self._find(session, name)
        if row is None or not row.visible_to(tenant):
            rows = session.scalars(select(ExpertRow))
            raise ExpertNotFound(name, known=[each.name for each in rows if each.visible_to(tenant)])
        return row

    def _owned(self, session: Session, name: str, tenant: str | None) -> ExpertRow:
        row = self._row(session, name, tenant)
        if tenant is not None and row.owner != tenant:
            raise NotOwner(name)
        return row

    def _version(self, expert: ExpertRow, number: int | None) -> VersionRow:
        for row in expert.versions:
            if row.number == number or (number is None and row.state == State.ACTIVE):
                return row
        raise VersionNotFound(expert.name, number, [f"{row.number} ({row.state})" for row in expert.versions])

    def _name_taken(self, session: Session, row: ExpertRow | None, proposal: Proposal) -> list[Reason]:
        if row is None:
            return list(taken_by_a_blend(session, proposal.name))
        owns = proposal.owner is None or proposal.owner == row.owner
        if owns and proposal.new_version:
            return []
        advice = "Choose another name" + (", or pass new_version to add a version to it." if owns else ".")
        return [Reason("name_taken", f"The name '{proposal.name}' is already taken. {advice}")]

    def _content_taken(self, session: Session, proposal: Proposal, digest: str) -> list[Reason]:
        """Only what the caller may see counts: the same weights in another tenant's private expert stay a secret."""
        same = session.scalars(select(VersionRow).where(VersionRow.digest == digest).order_by(VersionRow.id))
        for row in same:
            if row.expert.visible_to(proposal.owner):
                where = f"'{row.expert.name}' version {row.number} ({row.state})"
                message = f"The same adapter is registered already, as {where}."
                return [SameContent("content_registered", message, row.expert.name, row.number)]
        return []

    def _describe(
        self, proposal: Proposal, info: AdapterInfo, card: Card, origin: str, digest: str, number: int
    ) -> Expert:
        """What the caller says comes first, then what the model card says."""
        return Expert(
            name=proposal.name,
            version=number,
            digest=digest,
            state=State.STAGED,
            path=self.store.path(digest),
            base_model=self.base.name,
            rank=info.rank,
            target_modules=info.target_modules,
            source=origin,
            description=card.description if proposal.description is None else proposal.description,
            licence=card.licence if proposal.licence is None else proposal.licence,
            tags=card.tags if proposal.tags is None else proposal.tags,
            training_data=card.training_data if proposal.training_data is None else proposal.training_data,
            samples=proposal.samples,
            owner=proposal.owner,
            visibility=proposal.visibility,
        )

    def _expert(self, row: VersionRow) -> Expert:
        return Expert(
            name=row.expert.name,
            version=row.number,
            digest=row.digest,
            state=State(row.state),
            path=self.store.path(row.digest),
            base_model=row.base_model,
            rank=row.rank,
            target_modules=tuple(row.target_modules),
            source=row.source,
            description=row.description,
            licence=row.licence,
            tags=tuple(row.tags),
            owner=row.expert.owner,
            visibility="private" if row.expert.visibility == "private" else "public",
            training_data=tuple(row.training_data),
            samples=tuple(Sample(**sample) for sample in row.samples),
            checks=tuple(Check(**check) for check in row.checks),
            reasons=tuple(row.reasons),
            created_at=row.created_at,
        )

    def _referenced(self, digest: str) -> bool:
        with self._changes.session() as session:
            return session.scalar(select(func.count()).where(VersionRow.digest == digest)) != 0

    def _discard(self, digest: str) -> None:
        self.store.discard(digest, self._referenced)

    def _refuse_other_base(self) -> None:
        with self._changes.session() as session:
            others = set(session.scalars(select(VersionRow.base_model).distinct()))
        others = {name for name in others if name.casefold() not in self.base.accepted}
        if others:
            raise RegistryUnusable(
                f"{self._data_dir} holds experts of base model {', '.join(sorted(others))}, not of '{self.base.name}'. "
                "Use another data folder for each base model, or list the other name among this one's aliases."
            )


def _matrix(values: ArrayLike) -> FloatArray:
    matrix = np.asarray(values, dtype="<f4")
    if matrix.ndim != 2 or 0 in matrix.shape or not np.isfinite(matrix).all():
        raise ValueError(f"Prototypes must be a finite (rows, columns) matrix, not one of shape {matrix.shape}.")
    return matrix


def _prototype_row(encoder: str, matrix: FloatArray) -> PrototypeRow:
    rows, columns = matrix.shape
    return PrototypeRow(encoder=encoder, rows=rows, columns=columns, data=matrix.tobytes())


def _array(row: PrototypeRow) -> FloatArray:
    return np.frombuffer(row.data, dtype="<f4").reshape(row.rows, row.columns).copy()
