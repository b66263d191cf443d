"""Hearing of a changed routing without polling, on both databases."""

from __future__ import annotations

import asyncio

import pytest

from scion_adapters.database import Database
from scion_adapters.events import bump_routing, routing_revision
from scion_adapters.notifications import listen
from tests.helpers.waiting import until


class Ears:
    """Counts what it hears, and looks at the revision each time as a server does."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.revisions: list[int] = []

    def __call__(self) -> None:
        with self.database.read() as connection:
            self.revisions.append(routing_revision(connection))


async def bump(database: Database) -> None:
    def work() -> None:
        with database.write() as connection:
            bump_routing(connection)

    await asyncio.to_thread(work)


async def test_every_change_is_heard_once_it_is_committed(database: Database) -> None:
    ears = Ears(database)
    task = asyncio.create_task(listen(database, ears))
    await until(lambda: ears.revisions == [0])  # what happened before is looked at once
    for revision in range(1, 4):
        await bump(database)
        await until(lambda revision=revision: ears.revisions[-1] == revision)
    task.cancel()


async def test_an_uncommitted_change_is_not_heard(database: Database) -> None:
    ears = Ears(database)
    task = asyncio.create_task(listen(database, ears))
    await until(lambda: ears.revisions == [0])
    with database.engine.connect() as connection:
        bump_routing(connection)
        connection.rollback()
    await bump(database)
    await until(lambda: ears.revisions[-1] == 1)
    assert set(ears.revisions) == {0, 1}
    task.cancel()


async def test_a_lost_connection_raises_and_listening_again_finds_what_was_missed(postgres_database: Database) -> None:
    ears = Ears(postgres_database)
    task = asyncio.create_task(listen(postgres_database, ears))
    await until(lambda: ears.revisions == [0])
    with postgres_database.write() as connection:
        connection.exec_driver_sql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() "
            "AND datname = current_database() AND query LIKE 'LISTEN%%'"
        )
    with pytest.raises(Exception, match=r"terminat|closed"):
        await asyncio.wait_for(task, 10.0)
    await bump(postgres_database)
    again = asyncio.create_task(listen(postgres_database, ears))
    await until(lambda: ears.revisions[-1] == 1)
    again.cancel()
