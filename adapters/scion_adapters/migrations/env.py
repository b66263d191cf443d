"""Alembic's environment: runs migrations on the engine of scion_adapters.database, one process at a time."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context

from scion_adapters.tables import metadata

_LOCK_KEY = 0x5C10  # any number, the same in every process


def run() -> None:
    engine: sa.Engine = context.config.attributes["engine"]
    with engine.connect().execution_options(scion_immediate=True) as connection:
        context.configure(
            connection=connection,
            target_metadata=metadata,
            render_as_batch=True,
            transactional_ddl=True,  # alembic thinks SQLite cannot; it can, as we begin transactions ourselves
        )
        with context.begin_transaction():
            if connection.dialect.name == "postgresql":  # SQLite's BEGIN IMMEDIATE is the lock there
                connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK_KEY})
            context.run_migrations()


run()
