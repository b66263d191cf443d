from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from scion_adapters.database import Database
from scion_adapters.errors import ConflictError, InvalidInputError, ScionError
from scion_adapters.records import Run, RunState
from scion_adapters.settings import Settings, load_settings
from scion_trainer.config import run_config
from scion_trainer.daemon import cron_trigger
from scion_trainer.run_lease import Holder, claim
from scion_trainer.runs import RunStore
from scion_trainer.scheduler import Plan, TrainerJobs, counted_from, is_due, plans
from scion_trainer.stopping import RunInterruptedError
from tests.helpers.databases import sqlite_database
from tests.helpers.training import add_ratings

NOW = 1_000_500.0


@dataclass
class FakeLauncher:
    """Writes down what it was asked for; makes a run's row as the real one does, and raises what it is told to."""

    database: Database
    error: Exception | None = None
    calls: list[tuple[str, ...]] = field(default_factory=list)

    def start(self, adapter: str, recipe: str) -> Run:
        self.calls.append(("start", adapter, recipe))
        store = RunStore(self.database, lambda: NOW)
        run = store.create(adapter, run_config(Settings(), recipe), parent=0, directory=Path("runs"), actor="test")
        if self.error is not None:
            raise self.error
        return store.succeed(run.id, candidate=1, metrics={})

    def resume(self, run: Run) -> Run:
        self.calls.append(("resume", run.id))
        if self.error is not None:
            raise self.error
        return run


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = sqlite_database(tmp_path)
    yield database
    database.dispose()


@pytest.fixture
def launcher(database: Database) -> FakeLauncher:
    return FakeLauncher(database)


def settings(**trainer: object) -> Settings:
    return load_settings(
        overrides={"trainer": trainer, "adapters": {"chat": {}, "support": {"recipe": "sft", "min_new_ratings": 5}}}
    )


def jobs(database: Database, launcher: FakeLauncher, **trainer: object) -> TrainerJobs:
    return TrainerJobs(settings(**trainer), database, launcher)


def test_an_adapters_own_plan_overrides_the_general_one() -> None:
    assert plans(settings(schedule="0 3 * * *", min_new_ratings=50)) == [
        Plan("chat", "kto", "0 3 * * *", 50),
        Plan("support", "sft", "0 3 * * *", 5),
    ]


@pytest.mark.parametrize(
    ("new", "wanted", "due"),
    [
        (49, 50, False),
        (50, 50, True),
        (10_000, None, False),  # never by count
    ],
)
def test_when_enough_ratings_are_new(new: int, wanted: int | None, due: bool) -> None:
    assert is_due(new, wanted) is due


def test_enough_new_ratings_start_one_run(database: Database, launcher: FakeLauncher) -> None:
    subject = jobs(database, launcher, min_new_ratings=50)
    add_ratings(database, 49, at=NOW - 100)
    subject.check_ratings("chat")
    assert launcher.calls == []

    add_ratings(database, 1, at=NOW - 1)
    subject.check_ratings("chat")
    assert launcher.calls == [("start", "chat", "kto")]

    subject.check_ratings("chat")  # those ratings were counted already
    assert len(launcher.calls) == 1

    add_ratings(database, 50, at=NOW + 1)
    subject.check_ratings("chat")
    assert len(launcher.calls) == 2


def test_a_failed_run_is_not_repeated_at_every_check(database: Database, launcher: FakeLauncher) -> None:
    launcher.error = ScionError("all ratings are likes")
    subject = jobs(database, launcher, min_new_ratings=10)
    add_ratings(database, 10, at=NOW - 100)
    for _ in range(3):
        subject.check_ratings("chat")
    assert len(launcher.calls) == 1


def test_ratings_count_from_the_last_runs_snapshot(database: Database) -> None:
    import sqlalchemy as sa

    from scion_adapters.tables import snapshots

    assert counted_from(database, "chat") == 0.0
    store = RunStore(database, lambda: 100.0)
    run = store.create("chat", run_config(Settings(), "kto"), parent=0, directory=Path("runs"), actor="test")
    assert counted_from(database, "chat") == 100.0
    with database.write() as connection:
        row = {"id": "sha256:1", "adapter": "chat", "path": "p", "manifest": {}, "created_at": 130.0}
        connection.execute(sa.insert(snapshots).values(row))
    store.set_snapshot(run.id, "sha256:1")
    assert counted_from(database, "chat") == 130.0


def test_a_scheduled_time_starts_the_configured_recipe(database: Database, launcher: FakeLauncher) -> None:
    jobs(database, launcher).train("support")
    assert launcher.calls == [("start", "support", "sft")]


def test_an_adapter_that_left_the_configuration_is_not_trained(database: Database, launcher: FakeLauncher) -> None:
    subject = jobs(database, launcher)
    subject.train("gone")
    subject.check_ratings("gone")
    assert launcher.calls == []


def test_nothing_is_counted_while_a_run_works(database: Database, launcher: FakeLauncher) -> None:
    add_ratings(database, 10, at=NOW)
    claim(database, "support", Holder.of("run-other"))
    jobs(database, launcher).check_ratings("support")
    assert launcher.calls == []


@pytest.mark.parametrize(
    "error",
    [
        ConflictError("adapter chat is being trained by run-1"),  # by hand, at the same time
        RunInterruptedError("stopped at step 3"),  # the daemon is ending
        ScionError("5 usable ratings"),
    ],
)
def test_a_job_never_raises(database: Database, launcher: FakeLauncher, error: Exception) -> None:
    launcher.error = error
    jobs(database, launcher).train("chat")
    assert len(launcher.calls) == 1


def test_unfinished_runs_are_resumed(database: Database, launcher: FakeLauncher) -> None:
    store = RunStore(database)
    config = run_config(Settings(), "kto")
    waiting = store.create("chat", config, parent=0, directory=Path("runs"), actor="test")
    done = store.create("support", config, parent=0, directory=Path("runs"), actor="test")
    store.fail(done.id, "no ratings")
    jobs(database, launcher).resume_unfinished()
    assert launcher.calls == [("resume", waiting.id)]


def test_a_superseded_run_is_failed_and_not_resumed(database: Database, launcher: FakeLauncher) -> None:
    store, config = RunStore(database), run_config(Settings(), "kto")
    killed, later, waiting = (
        store.create("chat", config, parent=0, directory=Path("runs"), actor="test") for _ in range(3)
    )
    store.start(killed.id)
    store.interrupt(killed.id, "killed by SIGKILL")
    store.succeed(later.id, candidate=7, metrics={})
    jobs(database, launcher).resume_unfinished()
    assert launcher.calls == [("resume", waiting.id)]
    assert store.get(killed.id).state is RunState.FAILED
    assert re.fullmatch(
        f"superseded: {later.id} .*published version 7.*killed by SIGKILL", store.get(killed.id).error or ""
    )
    store.fail(waiting.id, "no ratings")
    jobs(database, launcher).resume_unfinished()
    assert len(launcher.calls) == 1


def test_a_superseded_run_that_is_resumed_by_hand_goes_on(database: Database, launcher: FakeLauncher) -> None:
    store, config = RunStore(database), run_config(Settings(), "kto")
    old, later = (store.create("chat", config, parent=0, directory=Path("runs"), actor="test") for _ in range(2))
    store.succeed(later.id, candidate=7, metrics={})
    claim(database, "chat", Holder.of(old.id))
    jobs(database, launcher).resume_unfinished()
    assert launcher.calls == []
    assert store.get(old.id).state is RunState.QUEUED


def test_a_run_that_somebody_works_on_is_left_alone(database: Database, launcher: FakeLauncher) -> None:
    run = RunStore(database).create("chat", run_config(Settings(), "kto"), parent=0, directory=Path("r"), actor="test")
    claim(database, "chat", Holder.of(run.id))
    jobs(database, launcher).resume_unfinished()
    assert launcher.calls == []


@pytest.mark.parametrize(
    ("weekdays", "december_2026"),  # the 6th is a Sunday
    [
        ("*", range(1, 32)),
        ("0", [6, 13, 20, 27]),
        ("7", [6, 13, 20, 27]),
        ("sun", [6, 13, 20, 27]),
        ("1", [7, 14, 21, 28]),
        ("6", [5, 12, 19, 26]),
        ("1,3", [2, 7, 9, 14, 16, 21, 23, 28, 30]),
        ("0,Wed", [2, 6, 9, 13, 16, 20, 23, 27, 30]),
        ("1-5", [day for day in range(1, 32) if day % 7 not in (5, 6)]),
        ("mon-fri", [day for day in range(1, 32) if day % 7 not in (5, 6)]),
        ("5-7", [day for day in range(1, 32) if day % 7 in (4, 5, 6)]),
        ("0-2", [day for day in range(1, 32) if day % 7 in (6, 0, 1)]),
        ("5-sun", [day for day in range(1, 32) if day % 7 in (4, 5, 6)]),
        ("0-7", range(1, 32)),
        ("*/2", [day for day in range(1, 32) if day % 7 in (6, 1, 3, 5)]),  # Sunday, Tuesday, Thursday, Saturday
        ("1-5/2", [day for day in range(1, 32) if day % 7 in (0, 2, 4)]),
        ("mon-fri/2", [day for day in range(1, 32) if day % 7 in (0, 2, 4)]),
        ("2/2", [day for day in range(1, 32) if day % 7 in (1, 3, 5)]),
        ("*/7", [6, 13, 20, 27]),
    ],
)
def test_weekdays_are_counted_as_cron_counts_them(weekdays: str, december_2026: Iterable[int]) -> None:
    trigger, at = cron_trigger(f"0 3 * * {weekdays}"), datetime(2026, 12, 1, tzinfo=UTC)
    fired = []
    while (at := trigger.get_next_fire_time(None, at)).month == 12:
        fired.append(at.day)
        at += timedelta(minutes=1)
    assert fired == list(december_2026)


@pytest.mark.parametrize(
    ("weekdays", "complaint"),
    [
        ("8", "'8' is not a weekday: 0 to 7"),
        ("1-", "'1-' is not a weekday"),
        ("*/0", "step of '.*' must be at least 1"),
        ("5-1", "'5-1' ends before it begins"),
        ("someday", "Invalid weekday name"),
        ("1,", "Unrecognized expression"),
    ],
)
def test_a_wrong_weekday_is_named(weekdays: str, complaint: str) -> None:
    with pytest.raises(InvalidInputError, match=f"{complaint}.*expected five fields"):
        cron_trigger(f"0 3 * * {weekdays}")


@pytest.mark.parametrize("expression", ["0 3 * *", "every night", "61 * * * *"])
def test_a_wrong_cron_expression_is_named(expression: str) -> None:
    with pytest.raises(InvalidInputError, match="expected five fields"):
        cron_trigger(expression)
