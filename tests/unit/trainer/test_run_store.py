from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from scion_adapters.database import Database
from scion_adapters.errors import ConflictError, NotFoundError
from scion_adapters.events import list_events
from scion_adapters.records import Run, RunState
from scion_adapters.settings import Settings
from scion_trainer.config import RunConfig, run_config
from scion_trainer.runs import RunStore
from tests.helpers.databases import sqlite_database

CONFIG = run_config(Settings(), "kto", since=12.0)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = sqlite_database(tmp_path)
    yield database
    database.dispose()


@pytest.fixture
def store(database: Database) -> RunStore:
    return RunStore(database, Clock())


def create(store: RunStore, adapter: str = "chat") -> Run:
    return store.create(adapter, CONFIG, parent=2, directory=Path("/runs"), actor="cli:ann")


def test_a_new_run_waits_and_remembers_its_configuration(store: RunStore) -> None:
    run = create(store)
    assert (run.state, run.attempt, run.parent, run.recipe) == (RunState.QUEUED, 0, 2, "kto")
    assert run.directory == f"/runs/{run.id}"
    assert RunConfig.from_json(run.config) == CONFIG
    assert store.get(run.id) == run


def test_a_configuration_of_a_newer_release_is_read() -> None:
    assert RunConfig.from_json({**CONFIG.to_json(), "added_later": 1}) == CONFIG


def test_a_run_from_start_to_end(store: RunStore, database: Database) -> None:
    run = create(store)
    assert store.start(run.id).state is RunState.RUNNING
    store.set_snapshot(run.id, "sha256:5")
    done = store.succeed(run.id, candidate=3, metrics={"steps": 7})
    assert (done.state, done.candidate, done.metrics, done.snapshot_id) == (
        RunState.SUCCEEDED,
        3,
        {"steps": 7},
        "sha256:5",
    )
    assert done.finished_at is not None
    events = [(event.kind, event.number, event.actor) for event in list_events(database)]
    assert events == [("run.created", None, "cli:ann"), ("run.succeeded", 3, "cli:ann")]


def test_an_interrupted_run_goes_on(store: RunStore) -> None:
    run = create(store)
    store.start(run.id)
    waiting = store.interrupt(run.id, "stopped at step 3")
    assert (waiting.state, waiting.error, waiting.finished_at) == (RunState.QUEUED, "stopped at step 3", None)
    again = store.start(run.id)
    assert (again.state, again.attempt, again.error) == (RunState.RUNNING, 2, None)


def test_a_run_that_was_killed_goes_on_too(store: RunStore) -> None:
    run = create(store)
    store.start(run.id)  # and nobody wrote down its end
    assert store.start(run.id).attempt == 2


@pytest.mark.parametrize("end", [RunState.SUCCEEDED, RunState.FAILED])
def test_an_ended_run_stays_ended(store: RunStore, end: RunState) -> None:
    run = create(store)
    ended = (
        store.succeed(run.id, candidate=1, metrics={})
        if end is RunState.SUCCEEDED
        else store.fail(run.id, "no ratings")
    )
    assert ended.state is end
    with pytest.raises(ConflictError, match=f"{run.id} has {end}"):
        store.start(run.id)
    assert store.interrupt(run.id, "late").state is end
    assert store.fail(run.id, "late").error == ended.error


def test_the_newest_unfinished_run_of_an_adapter(store: RunStore) -> None:
    first, second, other = create(store), create(store), create(store, "support")
    assert store.unfinished("chat") == second
    store.fail(second.id, "no ratings")
    assert store.unfinished("chat") == first
    assert store.newest("chat") is not None
    assert [run.id for run in store.list()] == [other.id, second.id, first.id]
    assert [run.id for run in store.list("chat", limit=1)] == [second.id]
    assert store.unfinished("nobody") is None


def test_an_unfinished_run_is_superseded_by_a_later_one_that_succeeded(store: RunStore) -> None:
    before, killed, failed, later, newest = (create(store) for _ in range(5))
    other = create(store, "support")
    store.start(killed.id)
    store.succeed(before.id, candidate=1, metrics={})
    store.fail(failed.id, "no ratings")
    store.succeed(other.id, candidate=1, metrics={})
    assert store.superseded("chat") == []
    store.succeed(later.id, candidate=2, metrics={})
    assert store.superseded("chat") == [(store.get(killed.id), store.get(later.id))]
    store.succeed(newest.id, candidate=3, metrics={})
    assert store.superseded("chat") == [(store.get(killed.id), store.get(newest.id))]


def test_a_run_that_published_nothing_supersedes_its_own_recipe_only(store: RunStore) -> None:
    create(store)
    reward = run_config(Settings(), "reward")
    old, later = (store.create("chat", reward, parent=2, directory=Path("/runs"), actor="cli:ann") for _ in range(2))
    store.succeed(later.id, candidate=None, metrics={})
    assert [found.id for found, _ in store.superseded("chat")] == [old.id]


@pytest.mark.parametrize("act", [RunStore.get, RunStore.start])
def test_an_unknown_run_is_said_so(store: RunStore, act: object) -> None:
    assert callable(act)
    with pytest.raises(NotFoundError, match="run-nope"):
        act(store, "run-nope")
