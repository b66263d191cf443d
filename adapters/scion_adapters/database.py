"""The database: engine, transactions, migration to the present schema. SQLite (WAL, synchronous=FULL) or PostgreSQL."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.dialects import postgresql, sqlite

from scion_adapters.clock import Clock
from scion_adapters.errors import ConflictError, UnavailableError
from scion_adapters.settings import Settings
from scion_adapters.tables import counters

BUSY_TIMEOUT_S = 10.0
WAL_RETRY_S = 0.01
_REMEDIES = {
    "disk is full": "free space on its disk",
    "No space left": "free space on its disk",
    "readonly database": "make its file and folder writable for this account",
    "read-only transaction": "it is a standby or was made read-only: name the primary in database.url, or promote it",
    "database is locked": "another process has been writing to it for long: let it finish, or end it",
}
_READ_ONLY = "25006"
"""What PostgreSQL answers to a write while it recovers, stands by, or is set to default_transaction_read_only."""
_MIGRATIONS = Path(__file__).parent / "migrations"
_ALEMBIC_LOCK = threading.Lock()  # alembic's commands keep their context in module globals


class Database:
    """A handle on the database. Cheap to share between threads; every method opens its own connection."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.is_sqlite = sa.make_url(url).get_backend_name() == "sqlite"
        if self.is_sqlite:
            database = sa.make_url(url).database
            if database and database != ":memory:":
                Path(database).parent.mkdir(parents=True, exist_ok=True)
            # BEGIN IMMEDIATE in `write`: a deferred transaction that turns into a writer fails instead of waiting.
            self.engine = sa.create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S})
            sa.event.listen(self.engine, "connect", _configure_sqlite)
            sa.event.listen(self.engine, "begin", _begin_sqlite)
        else:
            self.engine = sa.create_engine(url, pool_pre_ping=True, pool_size=5, connect_args={"connect_timeout": 5})

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A read-only transaction: everything in it sees one state."""
        with self._wrap(), self.engine.connect() as connection, connection.begin():
            if not self.is_sqlite:  # PostgreSQL's default shows each statement another state
                connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            yield connection

    @contextmanager
    def write(self) -> Iterator[sa.Connection]:
        """A transaction that is durable on return. Keep it short: SQLite has one writer at a time."""
        with self._wrap(), self.engine.connect() as connection:
            if self.is_sqlite:
                connection = connection.execution_options(scion_immediate=True)
            with connection.begin():
                yield connection

    @contextmanager
    def _wrap(self) -> Iterator[None]:
        try:
            yield
        except (sa.exc.OperationalError, sa.exc.InterfaceError, sa.exc.InternalError) as error:
            if isinstance(error, sa.exc.InternalError) and getattr(error.orig, "sqlstate", None) != _READ_ONLY:
                raise
            said = str(error.orig or error).strip()
            raise UnavailableError(
                f"the database {sa.make_url(self.url).render_as_string(hide_password=True)} does not answer: "
                f"{said}; {_remedy(said)}"
            ) from error

    def upgrade(self) -> None:
        """Bring the schema to the newest revision; does nothing when it is there already.

        Raises ConflictError as `check_revision` does.
        """
        self.check_revision()
        with self._wrap(), _ALEMBIC_LOCK:
            command.upgrade(self._alembic(), "head")

    def current_revision(self) -> str | None:
        """The schema revision of this database, or None for an empty one."""
        with self.read() as connection:
            return MigrationContext.configure(connection).get_current_revision()

    def check_revision(self) -> None:
        """Raises ConflictError when a newer program has migrated this database: this one does not know its schema."""
        current = self.current_revision()
        script = ScriptDirectory.from_config(self._alembic())
        if current is not None and current not in {known.revision for known in script.walk_revisions()}:
            raise ConflictError(
                f"the database {sa.make_url(self.url).render_as_string(hide_password=True)} was migrated by a newer "
                f"vllm-scion (revision {current}, this program knows up to {script.get_current_head()}): run that "
                "version"
            )

    def head_revision(self) -> str:
        """The newest schema revision that this code knows."""
        return str(ScriptDirectory.from_config(self._alembic()).get_current_head())

    def dispose(self) -> None:
        self.engine.dispose()

    def _alembic(self) -> Config:
        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        config.attributes["engine"] = self.engine
        return config


def open_database(settings: Settings, *, upgrade: bool = True) -> Database:
    """The configured database, migrated unless `upgrade` is false. Raises ConflictError if it is too new to be."""
    database = Database(settings.database_url)
    if upgrade and database.current_revision() != database.head_revision():
        database.upgrade()
    return database


def insert_ignore(connection: sa.Connection, table: sa.Table, rows: list[dict[str, Any]]) -> int:
    """INSERT … ON CONFLICT DO NOTHING on both databases. Returns how many rows were new."""
    if not rows:
        return 0
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    statement = dialect.insert(table).on_conflict_do_nothing()
    statement = statement.execution_options(preserve_rowcount=True)  # else psycopg's count is gone with the cursor: -1
    new = 0
    for row in rows:  # rowcount of executemany is undefined on both drivers; batches are small and share a transaction
        new += max(connection.execute(statement, row).rowcount, 0)
    return new


def next_value(connection: sa.Connection, name: str) -> int:
    """The next number of the named counter, from 1; never gives a number twice, also across processes."""
    insert_ignore(connection, counters, [{"name": name, "value": 0}])
    statement = (
        sa.update(counters)
        .where(counters.c.name == name)
        .values(value=counters.c.value + 1)
        .returning(counters.c.value)
    )
    return int(connection.execute(statement).scalar_one())


def time_in(connection: sa.Connection, clock: Clock | None) -> float:
    """Unix seconds: the database's own, so that hosts need not agree on theirs, unless a clock is injected."""
    return clock() if clock is not None else server_time(connection)


def server_time(connection: sa.Connection) -> float:
    """Unix seconds by the clock that all users of this database share: PostgreSQL's own; for SQLite, the host's."""
    if connection.dialect.name == "sqlite":
        return time.time()
    return float(connection.execute(sa.select(sa.extract("epoch", sa.func.clock_timestamp()))).scalar_one())


def _remedy(said: str) -> str:
    """What helps against a driver's message. Neither driver has codes for all of these that SQLAlchemy passes on."""
    for words, remedy in _REMEDIES.items():
        if words in said:
            return remedy
    return "check that it runs and that `scion db upgrade` was done"


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself; _begin_sqlite says how
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={int(BUSY_TIMEOUT_S * 1000)}")
    _use_wal(cursor)
    cursor.execute("PRAGMA synchronous=FULL")  # 2xx means on disk
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _use_wal(cursor: sqlite3.Cursor) -> None:
    """Switch the file to WAL, once and for all. Two that switch it at once both hold what the other waits for: SQLite
    then calls it locked at once, without its busy timeout, so the waiting is done here."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(WAL_RETRY_S)
        else:
            return


def _begin_sqlite(connection: sa.Connection) -> None:
    mode = "IMMEDIATE" if connection.get_execution_options().get("scion_immediate") else "DEFERRED"
    connection.exec_driver_sql(f"BEGIN {mode}")
