"""Alembic's entry: run the migrations on the connection that `open_database` passes in."""

from __future__ import annotations

from alembic import context

from adapters_registry.models import Table

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Table.metadata,
    render_as_batch=True,  # SQLite alters a table by copying it
)
with context.begin_transaction():
    context.run_migrations()
