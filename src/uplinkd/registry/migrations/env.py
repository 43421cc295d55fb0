"""What Alembic executes for each run: the revisions, in the transaction that `registry.sql` has begun."""

from __future__ import annotations

from alembic import context

from uplinkd.registry.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite alters a table by copying it
)
with context.begin_transaction():
    context.run_migrations()
