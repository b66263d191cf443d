"""The database handle on SQLite: durability, one writer at a time, counters, and errors that help."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa

from scion_adapters import tables
from scion_adapters.database import Database, insert_ignore, next_value, open_database
from scion_adapters.errors import ConflictError, UnavailableError
from scion_adapters.events import bump_routing, list_events, record, routing_revision
from scion_adapters.settings import load_settings
from tests.helpers.databases import sqlite_database


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = sqlite_database(tmp_path)
    yield database
    database.dispose()


# pragma, value: what "2xx means on disk" rests on
PRAGMAS = [
    ("journal_mode", "wal"),  # readers do not wait for the writer
    ("synchronous", 2),  # FULL: a commit survives a power cut
    ("foreign_keys", 1),  # off by default in SQLite
    ("busy_timeout", 10_000),  # wait for the other writer instead of failing
]


@pytest.mark.parametrize(("name", "value"), PRAGMAS)
def test_every_connection_is_configured(database: Database, name: str, value: object) -> None:
    with database.read() as first, database.read() as second:  # two different connections
        for connection in (first, second):
            assert connection.exec_driver_sql(f"PRAGMA {name}").scalar() == value


def test_a_failed_block_is_rolled_back(database: Database) -> None:
    def fail() -> None:
        with database.write() as connection:
            next_value(connection, "x")
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        fail()
    with database.write() as connection:
        assert next_value(connection, "x") == 1


def test_readers_see_one_state_while_a_writer_commits(database: Database) -> None:
    with database.read() as reader:
        assert routing_revision(reader) == 0
        with database.write() as writer:
            bump_routing(writer)
        assert routing_revision(reader) == 0
    with database.read() as reader:
        assert routing_revision(reader) == 1


def test_writers_wait_for_each_other(database: Database) -> None:
    inside, release = threading.Event(), threading.Event()

    def slow() -> int:
        with database.write() as connection:
            value = next_value(connection, "x")
            inside.set()
            assert release.wait(10)
            return value

    def quick() -> int:
        with database.write() as connection:
            return next_value(connection, "x")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(slow)
        assert inside.wait(10)
        second = pool.submit(quick)
        assert not second.done()
        release.set()
        assert (first.result(10), second.result(10)) == (1, 2)


def test_counters_never_give_a_number_twice(database: Database) -> None:
    def take(_: int) -> int:
        with database.write() as connection:
            return next_value(connection, "x")

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(take, range(20))) == list(range(1, 21))


def test_insert_ignore_counts_what_was_new(database: Database) -> None:
    rows = [{"name": name, "created_at": 1.0} for name in ("a", "b", "a")]
    with database.write() as connection:
        assert insert_ignore(connection, tables.adapters, []) == 0
        assert insert_ignore(connection, tables.adapters, rows) == 2
        assert insert_ignore(connection, tables.adapters, rows) == 0


def test_events_page_in_both_directions(database: Database) -> None:
    with database.write() as connection:
        for number in range(1, 6):
            record(
                connection,
                float(number),
                "alias.set",
                actor="me",
                adapter="chat" if number % 2 else "code",
                number=number,
            )
    assert [event.number for event in list_events(database, limit=2)] == [1, 2]
    assert [event.number for event in list_events(database, after_id=2, limit=2)] == [3, 4]
    assert [event.number for event in list_events(database, limit=2, newest=True)] == [4, 5]
    assert [event.number for event in list_events(database, adapter="code")] == [2, 4]


def test_an_event_keeps_what_it_was_given(database: Database) -> None:
    with database.write() as connection:
        record(
            connection,
            1.5,
            "rollout.step",
            actor="x" * 200,
            reason="why",
            adapter="chat",
            number=7,
            data={"weight": 0.5},
        )
    (event,) = list_events(database)
    assert (event.at, event.kind, event.reason, event.data) == (1.5, "rollout.step", "why", {"weight": 0.5})
    assert event.actor == "x" * 128  # as long as its column


def test_opening_migrates_once(tmp_path: Path) -> None:
    (tmp_path / "scion.toml").write_text('[database]\nurl = "sqlite:///deep/down/scion.db"\n')
    settings = load_settings(tmp_path / "scion.toml")
    unmigrated = open_database(settings, upgrade=False)
    assert unmigrated.current_revision() is None
    unmigrated.dispose()
    database = open_database(settings)
    assert database.current_revision() == database.head_revision()
    database.dispose()


def test_a_database_of_a_newer_program_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "scion.toml").write_text('[database]\nurl = "sqlite:///scion.db"\n')
    settings = load_settings(tmp_path / "scion.toml")
    database = open_database(settings)
    with database.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    for use in (database.upgrade, lambda: open_database(settings)):
        with pytest.raises(ConflictError, match=r"newer vllm-scion \(revision 9999, .*\): run that version"):
            use()
    assert database.current_revision() == "9999"
    database.dispose()


def test_threads_may_migrate_at_once(tmp_path: Path) -> None:
    databases = [Database(f"sqlite:///{tmp_path / 'scion.db'}") for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda database: database.upgrade(), databases))
    for database in databases:
        assert database.current_revision() == database.head_revision()
        database.dispose()


@pytest.mark.parametrize("statement", [1, 5, 30])
def test_a_migration_that_breaks_off_leaves_nothing(tmp_path: Path, statement: int) -> None:
    database = Database(f"sqlite:///{tmp_path / 'scion.db'}")
    count = 0

    def fail(*_: object) -> None:
        nonlocal count
        count += 1
        if count == statement:
            raise RuntimeError("killed")

    sa.event.listen(database.engine, "before_cursor_execute", fail)
    with pytest.raises(RuntimeError, match="killed"):
        database.upgrade()
    sa.event.remove(database.engine, "before_cursor_execute", fail)
    with database.read() as connection:
        assert sa.inspect(connection).get_table_names() == []
    database.upgrade()
    assert database.current_revision() == database.head_revision()
    database.dispose()


def test_a_database_that_is_away_is_unavailable_and_keeps_its_password() -> None:
    database = Database("postgresql+psycopg://scion:secret@127.0.0.1:1/none")
    with pytest.raises(UnavailableError, match="scion db upgrade") as caught, database.read():
        pass
    assert "secret" not in str(caught.value)


def test_a_database_without_tables_says_what_to_do(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'empty.db'}")
    with pytest.raises(UnavailableError, match="scion db upgrade"), database.read() as connection:
        connection.execute(sa.select(tables.events))
    database.dispose()
