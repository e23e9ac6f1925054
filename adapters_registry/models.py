"""The tables. A name points to immutable versions; prototypes, tensors and checks hang on one; blends name versions."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import JSON, DateTime, Dialect, Double, ForeignKey, Index, LargeBinary, Text, UniqueConstraint, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.types import TypeDecorator, TypeEngine


class Moment(TypeDecorator[datetime]):
    """An instant in UTC; SQLite drops the time zone, so it is put back when read."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def now() -> datetime:
    return datetime.now(UTC)


class Table(DeclarativeBase):
    type_annotation_map: ClassVar[dict[Any, type[TypeEngine[Any]]]] = {
        str: Text,
        datetime: Moment,
        float: Double,
        list[str]: JSON,
        list[dict[str, Any]]: JSON,
        dict[str, Any]: JSON,
    }


class ExpertRow(Table):
    """A name. `last_version` only grows, so that a removed version's number never means something else."""

    __tablename__ = "experts"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    owner: Mapped[str | None]
    visibility: Mapped[str]
    last_version: Mapped[int]

    versions: Mapped[list[VersionRow]] = relationship(
        back_populates="expert", cascade="all, delete-orphan", order_by="VersionRow.number"
    )

    def visible_to(self, tenant: str | None) -> bool:
        return self.visibility == "public" or tenant is None or tenant == self.owner


class VersionRow(Table):
    """One adapter under a name. `activated` is the generation at which it last became active, 0 for never."""

    __tablename__ = "versions"
    __table_args__ = (
        UniqueConstraint("expert_id", "number"),
        # At most one active version for each name, whatever the code does.
        Index(
            "one_active_version",
            "expert_id",
            unique=True,
            sqlite_where=text("state = 'active'"),
            postgresql_where=text("state = 'active'"),
        ),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    expert_id: Mapped[int] = mapped_column(ForeignKey("experts.id", ondelete="CASCADE"))
    number: Mapped[int]
    digest: Mapped[str] = mapped_column(index=True)
    state: Mapped[str]
    activated: Mapped[int] = mapped_column(default=0)
    base_model: Mapped[str]
    rank: Mapped[int]
    target_modules: Mapped[list[str]]
    source: Mapped[str]
    description: Mapped[str]
    licence: Mapped[str | None]
    tags: Mapped[list[str]]
    training_data: Mapped[list[str]]
    samples: Mapped[list[dict[str, Any]]]
    checks: Mapped[list[dict[str, Any]]]
    reasons: Mapped[list[str]]
    created_at: Mapped[datetime] = mapped_column(default=now)

    expert: Mapped[ExpertRow] = relationship(back_populates="versions", lazy="joined", innerjoin=True)
    prototypes: Mapped[list[PrototypeRow]] = relationship(cascade="all, delete-orphan")
    # Megabytes: the database deletes them with their version, nothing loads them for that.
    tensors: Mapped[list[TensorsRow]] = relationship(cascade="all, delete-orphan", passive_deletes=True)
    measured: Mapped[list[CheckRow]] = relationship(cascade="all, delete-orphan", passive_deletes=True)


class PrototypeRow(Table):
    """What stands for a version in one encoder's space: a (rows, columns) matrix of little-endian float32."""

    __tablename__ = "prototypes"

    version_id: Mapped[int] = mapped_column(ForeignKey("versions.id", ondelete="CASCADE"), primary_key=True)
    encoder: Mapped[str] = mapped_column(primary_key=True)
    rows: Mapped[int]
    columns: Mapped[int]
    data: Mapped[bytes] = mapped_column(LargeBinary)


class TensorsRow(Table):
    """Tensors kept with a version under a key: safetensors bytes, as `adapters_registry.tensors` packs them."""

    __tablename__ = "tensors"

    version_id: Mapped[int] = mapped_column(ForeignKey("versions.id", ondelete="CASCADE"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    data: Mapped[bytes] = mapped_column(LargeBinary)


class CheckRow(Table):
    """What was measured of a version after it was registered, or a report on it, under a key: JSON."""

    __tablename__ = "checks"

    version_id: Mapped[int] = mapped_column(ForeignKey("versions.id", ondelete="CASCADE"), primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    data: Mapped[dict[str, Any]]


class BlendRow(Table):
    """A stored blend. Its members name versions by content and may leave before it does; then it cannot be used.

    `name` None: it is only known by its `digest`, which different owners may have stored.
    """

    __tablename__ = "blends"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(unique=True)
    digest: Mapped[str] = mapped_column(index=True)
    owner: Mapped[str | None]
    visibility: Mapped[str]
    description: Mapped[str]
    operator: Mapped[str]
    settings: Mapped[dict[str, Any]]
    members: Mapped[list[dict[str, Any]]]
    lineage: Mapped[list[dict[str, Any]]]
    report: Mapped[dict[str, Any]]
    search: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=now)


class GenerationRow(Table):
    """One row that every change increments first: a version counter, and the lock that puts writers in a line."""

    __tablename__ = "generation"

    id: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[int]


class EventRow(Table):
    """Who changed what, and when; kept when the expert is gone."""

    __tablename__ = "events"

    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(default=now)
    generation: Mapped[int]
    actor: Mapped[str | None]
    action: Mapped[str]
    expert: Mapped[str]
    version: Mapped[int | None]
    detail: Mapped[dict[str, Any]]


class DecisionRow(Table):
    """A decision that was made for a request, and what the user thought of the answer.

    `vector` is the prompt's embedding by `encoder`, little-endian float16; `text` is empty unless texts are kept.
    """

    __tablename__ = "decisions"

    number: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    at: Mapped[datetime] = mapped_column(default=now)
    tenant: Mapped[str | None]
    method: Mapped[str]
    kind: Mapped[str]
    experts: Mapped[list[dict[str, Any]]]
    candidates: Mapped[list[dict[str, Any]]]
    confidence: Mapped[float]
    router: Mapped[int]
    encoder: Mapped[str]
    vector: Mapped[bytes] = mapped_column(LargeBinary)
    text: Mapped[str | None]
    score: Mapped[float | None]
    comment: Mapped[str | None]
    rated_at: Mapped[datetime | None] = mapped_column(index=True)


class KeyRow(Table):
    """An API key; of its secret only the sha256 is kept."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    owner: Mapped[str]
    scopes: Mapped[list[str]]
    sha256: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(default=now)
    revoked_at: Mapped[datetime | None]
