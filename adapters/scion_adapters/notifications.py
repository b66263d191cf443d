"""Hearing at once that the routing changed: PostgreSQL says so (LISTEN), SQLite is asked (PRAGMA data_version).

What is heard is only a reason to look; looking now and then remains the way that cannot fail. Knows nothing of what
changed.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import closing
from typing import Any

import sqlalchemy as sa

from scion_adapters import tables
from scion_adapters.database import Database

ROUTING_CHANNEL = "scion_routing"
ROUTING_COUNTER = "routing"
SQLITE_INTERVAL_S = 0.02
"""How often SQLite's change counter is read: some microseconds, on a connection of its own that waits for no lock."""

CONFIRM_INTERVAL_S = 30.0
"""How often a silent PostgreSQL connection is asked whether it still lives."""


def routing_revision_query() -> sa.Select[Any]:
    """The present routing revision; no row before the first change."""
    return sa.select(tables.counters.c.value).where(tables.counters.c.name == ROUTING_COUNTER)


def notify_routing(connection: sa.Connection, revision: int) -> None:
    """Tell listening processes, once the caller's transaction is committed. SQLite needs no telling."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_notify(ROUTING_CHANNEL, str(revision))))


async def listen(database: Database, on_change: Callable[[], None]) -> None:
    """Call `on_change` whenever the routing may have changed, until cancelled; once at the start, too.

    Raises the driver's error when the database goes away: call again.
    """
    if database.is_sqlite:
        await _ask_sqlite(database, on_change)
    else:
        await _listen_postgresql(database, on_change)


async def _ask_sqlite(database: Database, on_change: Callable[[], None]) -> None:
    path = sa.make_url(database.url).database
    query = str(routing_revision_query().compile(compile_kwargs={"literal_binds": True}))
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=0, isolation_level=None)) as connection:
        seen: int | None = None
        heard: int | None = None
        while True:
            version = connection.execute("PRAGMA data_version").fetchone()[0]
            if version != seen:  # votes and records count there, too: nobody should have to look for those
                row = connection.execute(query).fetchone()
                revision = row[0] if row else 0
                if revision != heard:
                    heard = revision
                    on_change()
                seen = version
            await asyncio.sleep(SQLITE_INTERVAL_S)


async def _listen_postgresql(database: Database, on_change: Callable[[], None]) -> None:
    import psycopg  # comes with the extra `postgres`

    url = sa.make_url(database.url).set(drivername="postgresql").render_as_string(hide_password=False)
    connection: Any = await psycopg.AsyncConnection.connect(url, autocommit=True, connect_timeout=5)
    async with connection:
        await connection.execute(f"LISTEN {ROUTING_CHANNEL}")
        on_change()  # what happened before we listened
        while True:
            async for _ in connection.notifies(timeout=CONFIRM_INTERVAL_S):
                on_change()
            await connection.execute("SELECT 1")
