"""The daemon with a real APScheduler and its jobs in a real database; only what it launches is fake."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import sqlalchemy as sa
from apscheduler.jobstores.sqlalchemy import SQLAlchemyJobStore

from scion_adapters.database import Database
from scion_adapters.errors import ConflictError, ScionError
from scion_adapters.leases import current_holder
from scion_adapters.records import Run
from scion_adapters.settings import Settings, load_settings
from scion_trainer import daemon as daemon_module
from scion_trainer.config import run_config
from scion_trainer.daemon import Daemon
from scion_trainer.runs import RunStore
from tests.helpers.databases import sqlite_database
from tests.helpers.training import add_ratings
from tests.helpers.waiting import wait_for


@dataclass
class FakeLauncher:
    """Makes runs that succeed at once, or that last until `go_on` is set."""

    database: Database
    go_on: threading.Event = field(default_factory=threading.Event)
    calls: list[tuple[str, ...]] = field(default_factory=list)

    def start(self, adapter: str, recipe: str) -> Run:
        store = RunStore(self.database)
        run = store.create(adapter, run_config(Settings(), recipe), parent=0, directory=Path("runs"), actor="test")
        self.calls.append(("start", adapter, recipe))
        self.go_on.wait(30)
        return store.succeed(run.id, candidate=1, metrics={})

    def resume(self, run: Run) -> Run:
        self.calls.append(("resume", run.id))
        return RunStore(self.database).succeed(run.id, candidate=1, metrics={})


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = sqlite_database(tmp_path)
    yield database
    database.dispose()


class FailingStore(SQLAlchemyJobStore):
    """A job store that cannot write while `errors` has something to raise."""

    errors: ClassVar[list[Exception]] = []

    def update_job(self, job: Any) -> None:
        if self.errors:
            raise self.errors.pop()
        super().update_job(job)


@pytest.fixture
def store_errors(monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """What the daemon's next writes of its jobs raise, the last first."""
    errors: list[Exception] = []
    monkeypatch.setattr(FailingStore, "errors", errors)
    monkeypatch.setattr(daemon_module, "SQLAlchemyJobStore", FailingStore)
    monkeypatch.setattr(daemon_module, "RETRY_S", 0.01)
    return errors


def settings(**trainer: Any) -> Settings:
    return load_settings(overrides={"trainer": {"check_interval_s": 0.05, **trainer}})


@contextmanager
def running(settings: Settings, database: Database, launcher: FakeLauncher) -> Iterator[Daemon]:
    daemon = Daemon(settings, database, launcher, stop_children=launcher.go_on.set)
    thread = threading.Thread(target=daemon.run)
    thread.start()
    try:
        yield daemon
    finally:
        daemon.stop()
        thread.join(30)
        assert not thread.is_alive(), "the daemon did not end"


def stored_jobs(database: Database) -> list[str]:
    with database.read() as connection:
        return sorted(connection.execute(sa.text("SELECT id FROM scheduler_jobs")).scalars())


def test_new_ratings_start_a_run_and_only_one(database: Database) -> None:
    launcher = FakeLauncher(database)
    launcher.go_on.set()
    with running(settings(min_new_ratings=10), database, launcher):
        wait_for(lambda: "ratings:chat" in stored_jobs(database), "the job in the database")
        assert launcher.calls == []
        add_ratings(database, 10, at=1e10)
        wait_for(lambda: launcher.calls, "the run")
    assert launcher.calls[0] == ("start", "chat", "kto")


def test_unfinished_runs_are_resumed_at_the_start(database: Database) -> None:
    run = RunStore(database).create(
        "chat", run_config(Settings(), "kto"), parent=0, directory=Path("runs"), actor="test"
    )
    launcher = FakeLauncher(database)
    with running(settings(schedule="0 3 * * *"), database, launcher):
        wait_for(lambda: launcher.calls, "the resumption")
    assert launcher.calls == [("resume", run.id)]


def test_a_stop_reaches_the_children_and_waits_for_them(database: Database) -> None:
    add_ratings(database, 10, at=1e10)
    launcher = FakeLauncher(database)
    with running(settings(min_new_ratings=10), database, launcher):
        wait_for(lambda: launcher.calls, "the run")
        assert not launcher.go_on.is_set()
    assert launcher.go_on.is_set()
    assert current_holder(database, "scheduler") is None


def test_only_one_daemon_works_on_a_database(database: Database) -> None:
    launcher = FakeLauncher(database)
    with running(settings(min_new_ratings=10), database, launcher):
        wait_for(lambda: current_holder(database, "scheduler"), "the lease")
        with pytest.raises(ConflictError, match="scheduler is held by"):
            Daemon(settings(min_new_ratings=10), database, launcher).run()


def test_the_stored_jobs_follow_the_configuration(database: Database) -> None:
    launcher = FakeLauncher(database)
    for changes, expected in (
        ({"schedule": "0 3 * * *", "min_new_ratings": 10}, ["ratings:chat", "schedule:chat"]),
        ({"schedule": "0 4 * * *"}, ["schedule:chat"]),  # the count was switched off while the daemon was down
    ):
        with running(settings(**changes), database, launcher):
            wait_for(lambda wanted=expected: stored_jobs(database) == wanted, f"jobs {expected}")


def test_the_next_time_of_a_schedule_survives_a_restart(database: Database) -> None:
    launcher = FakeLauncher(database)
    times = []
    for _ in range(2):
        with running(settings(schedule="0 3 1 1 *"), database, launcher):
            wait_for(lambda: "schedule:chat" in stored_jobs(database), "the job")
            with database.read() as connection:
                query = sa.text("SELECT next_run_time FROM scheduler_jobs WHERE id = 'schedule:chat'")
                times.append(connection.execute(query).scalar())
    assert times[0] == times[1]
    assert times[0] is not None


def test_the_scheduler_goes_on_after_a_failed_write(database: Database, store_errors: list[Exception]) -> None:
    store_errors += [sa.exc.OperationalError("UPDATE", {}, Exception("database is locked"))] * 2
    launcher = FakeLauncher(database)
    launcher.go_on.set()
    with running(settings(min_new_ratings=10), database, launcher):
        wait_for(lambda: not store_errors, "the failed writes")
        add_ratings(database, 10, at=1e10)
        wait_for(lambda: launcher.calls, "the run")
    assert launcher.calls[0] == ("start", "chat", "kto")


@pytest.mark.timeout(30)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # the thread dies, as intended
def test_the_daemon_ends_with_its_scheduler(database: Database, store_errors: list[Exception]) -> None:
    store_errors.append(RuntimeError("a defect"))
    with pytest.raises(ScionError, match=r"scheduler's thread died.*start `scion trainer` again"):
        Daemon(settings(min_new_ratings=10), database, FakeLauncher(database)).run()
    assert current_holder(database, "scheduler") is None
