"""The migrations make exactly the schema of tables.py, on both databases, and keep the rows of an old database."""

from __future__ import annotations

import subprocess
import sys

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from scion_adapters import tables
from scion_adapters.database import Database
from scion_adapters.events import list_events, record
from tests.helpers.old_database import FIRST_REVISION, check_rows, make_old


def test_migrations_make_exactly_the_tables(database: Database) -> None:
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        differences = compare_metadata(context, tables.metadata)
    assert differences == []


def test_all_revisions_stand_in_one_line() -> None:
    script = ScriptDirectory.from_config(Database("sqlite://")._alembic())
    assert len(script.get_heads()) == 1
    assert script.get_base() == FIRST_REVISION


def test_an_old_database_keeps_its_rows(empty_url: str) -> None:
    database = Database(empty_url)
    make_old(database)
    database.upgrade()
    assert database.current_revision() == database.head_revision()
    check_rows(database)
    database.upgrade()  # again: nothing to do
    database.dispose()


def test_processes_that_start_at_once_migrate_once(empty_url: str) -> None:
    program = "import sys; from scion_adapters.database import Database; Database(sys.argv[1]).upgrade()"
    processes = [subprocess.Popen([sys.executable, "-c", program, empty_url]) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    database = Database(empty_url)
    assert database.current_revision() == database.head_revision()
    database.dispose()


@pytest.mark.parametrize("statement", ["UPDATE events SET reason = 'another'", "DELETE FROM events"])
def test_events_can_neither_be_changed_nor_deleted(database: Database, statement: str) -> None:
    with database.write() as connection:
        record(connection, 1.0, "alias.set", actor="test", reason="as it was")
    # RAISE(ABORT) is an IntegrityError in sqlite3; RAISE EXCEPTION an InternalError in psycopg.
    with pytest.raises(sa.exc.DBAPIError, match="append-only"), database.write() as connection:
        connection.execute(sa.text(statement))
    assert [event.reason for event in list_events(database)] == ["as it was"]


def test_events_cannot_be_truncated_on_postgresql(postgres_database: Database) -> None:
    with pytest.raises(sa.exc.DBAPIError, match="append-only"), postgres_database.write() as connection:
        connection.execute(sa.text("TRUNCATE events"))
