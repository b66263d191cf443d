"""The migrations make exactly the schema of tables.py, on both databases, and keep the rows of an old database."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from scion_adapters import tables
from scion_adapters.database import Database
from scion_adapters.events import list_events, record

FIRST_REVISION = "0001"


def test_migrations_make_exactly_the_tables(database: Database) -> None:
    with database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        differences = compare_metadata(context, tables.metadata)
    assert differences == []


def test_all_revisions_stand_in_one_line() -> None:
    script = ScriptDirectory.from_config(Database("sqlite://")._alembic())
    assert len(script.get_heads()) == 1
    assert script.get_base() == FIRST_REVISION


# One row of the first schema per table that others hang on. A later revision that adds a NOT NULL column must fill it.
OLD_ROWS: list[tuple[str, dict[str, Any]]] = [
    ("adapters", {"name": "chat", "created_at": 1.0}),
    ("counters", {"name": "number:chat", "value": 7}),
    ("counters", {"name": "lora_id", "value": 9}),
    (
        "versions",
        {
            "adapter": "chat", "number": 7, "lora_id": 9, "digest": "sha256:" + "a" * 64, "state": "accepted",
            "parent": 0, "base_fingerprint": "sha256:" + "b" * 64, "metrics": "{}", "rank": 16, "size_bytes": 1000,
            "evaluation_key": "key", "created_at": 1.0, "created_by": "test",
        },
    ),
    ("aliases", {"adapter": "chat", "alias": "champion", "number": 7, "updated_at": 2.0}),
    ("events", {"at": 1.0, "kind": "version.published", "actor": "test", "reason": "", "data": "{}"}),
    (
        "completions",
        {
            "id": "chatcmpl-1", "record_id": "r1", "adapter": "chat", "number": 7, "probability": 1.0,
            "requested_model": "chat", "route": "chat", "request": "{}", "choices": "[]", "latency_ms": 3.0,
            "stream": False, "created_at": 3.0,
        },
    ),
    (
        "feedback",
        {
            "id": "fb-1", "sequence": 1, "body_digest": "c" * 64, "completion_id": "chatcmpl-1", "choice_index": 0,
            "name": "rating", "value": 1.0, "source": "user", "metadata": "{}", "counts": True, "created_at": 4.0,
        },
    ),
]  # fmt: skip


def test_an_old_database_keeps_its_rows(empty_url: str) -> None:
    database = Database(empty_url)
    command.upgrade(database._alembic(), FIRST_REVISION)
    assert database.current_revision() == FIRST_REVISION
    with database.write() as connection:
        for table, row in OLD_ROWS:  # in words of the old schema, hence no use of tables.py
            columns, marks = ", ".join(row), ", ".join(f":{name}" for name in row)
            connection.execute(sa.text(f"INSERT INTO {table} ({columns}) VALUES ({marks})"), row)

    database.upgrade()

    assert database.current_revision() == database.head_revision()
    with database.read() as connection:
        for table, row in OLD_ROWS:
            query = sa.text(f"SELECT count(*) FROM {table} WHERE {next(iter(row))} = :value")
            assert connection.execute(query, {"value": next(iter(row.values()))}).scalar() == 1, table
        version = connection.execute(sa.select(tables.versions)).mappings().one()
        assert (version["number"], version["lora_id"], version["metrics"]) == (7, 9, {})
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
