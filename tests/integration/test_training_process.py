"""Runs as processes: killed, stopped, resumed, refused. Every child is a real `python -m scion_trainer.run`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from scion_adapters.errors import ConflictError, InvalidInputError, NotFoundError, ScionError
from scion_adapters.records import Run, RunState
from scion_adapters.registry import open_registry
from scion_trainer.checkpoints import CHECKPOINTS, MARKER
from scion_trainer.execution import execute
from scion_trainer.launch import (
    MALLOC_THRESHOLD_ENV,
    MAX_ATTEMPTS,
    Process,
    RunKilledError,
    child_environment,
    create_run,
    launch_run,
    resumable_run,
)
from scion_trainer.progress import read_metrics
from scion_trainer.run_lease import Holder, working_on
from scion_trainer.runs import RunStore
from scion_trainer.stopping import RunInterruptedError
from tests.helpers.training import Project, add_ratings, make_project
from tests.helpers.waiting import wait_for

EVERY_STEPS = 4


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    project = make_project(tmp_path, trainer__kto__epochs=8, trainer__checkpoint_every_steps=EVERY_STEPS)
    add_ratings(project.database, 40)
    yield project
    project.database.dispose()


def new_run(project: Project) -> Run:
    return create_run(project.settings, project.database, "chat", "kto", actor="test")


def checkpointed(run: Run) -> bool:
    return any(Path(run.directory, CHECKPOINTS).glob(f"*/{MARKER}"))


def losses(run: Run) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_metrics(Path(run.directory))}


def steps_done(run: Run) -> list[int]:
    """Every step that was done, in order, those that were done again included."""
    lines = Path(run.directory, "metrics.jsonl").read_text().splitlines()
    return [int(line.split('"step": ')[1].split(",")[0]) for line in lines]


def signal_once(run: Run, number: signal.Signals) -> tuple[threading.Thread, list[Process]]:
    """A thread that sends `number` to the run's process after its first checkpoint, and the list it takes it from."""
    processes: list[Process] = []

    def act() -> None:
        wait_for(lambda: processes and checkpointed(run), "the first checkpoint", timeout_s=120)
        processes[0].send_signal(number)

    thread = threading.Thread(target=act)
    thread.start()
    return thread, processes


def test_a_killed_run_resumes_and_ends_as_if_nothing_had_happened(project: Project) -> None:
    run = new_run(project)
    thread, processes = signal_once(run, signal.SIGKILL)
    with pytest.raises(RunKilledError, match=r"SIGKILL.*out of memory.*--resume"):
        launch_run(project.settings, project.database, run, started=processes.append)
    thread.join()
    killed_at = max(steps_done(run))
    interrupted = RunStore(project.database).get(run.id)
    assert interrupted.state is RunState.QUEUED
    assert "SIGKILL" in (interrupted.error or "")

    done = launch_run(project.settings, project.database, resumable_run(project.database, "chat"))
    whole = new_run(project)  # the same, never interrupted
    execute(project.settings, project.database, whole.id)
    whole = RunStore(project.database).get(whole.id)

    assert done.metrics["steps"] == whole.metrics["steps"] > killed_at
    again = len(steps_done(done)) - done.metrics["steps"]
    assert 0 <= again <= EVERY_STEPS, "more than one checkpoint's work was lost"
    assert done.snapshot_id == whole.snapshot_id
    for step, loss in losses(whole).items():
        assert losses(done)[step] == pytest.approx(loss, abs=1e-4), f"step {step}"
    assert done.metrics["train_loss"] == pytest.approx(whole.metrics["train_loss"], abs=1e-4)
    versions = open_registry(project.settings, project.database).versions("chat")
    assert [version.run_id for version in versions] == [run.id, whole.id]  # one candidate each


def test_a_terminated_run_writes_a_checkpoint_first(project: Project) -> None:
    run = new_run(project)
    thread, processes = signal_once(run, signal.SIGTERM)
    with pytest.raises(RunInterruptedError, match=r"stopped at step \d+ of 40.*--resume"):
        launch_run(project.settings, project.database, run, started=processes.append)
    thread.join()
    stopped_at = max(steps_done(run))
    assert Path(run.directory, CHECKPOINTS, f"checkpoint-{stopped_at}", MARKER).is_file()
    execute(project.settings, project.database, resumable_run(project.database, "chat").id)
    assert steps_done(run) == list(range(1, 41))  # nothing was lost and nothing done twice


def test_a_run_that_nobody_waited_for_is_resumed_by_the_same_command(project: Project) -> None:
    """Parent and child both killed: only the lease, held by a dead process, says that somebody worked."""
    run = new_run(project)
    command = [sys.executable, "-m", "scion_trainer.run", run.id]
    environment = {**os.environ, **child_environment(project.settings)}
    with subprocess.Popen(command, env=environment) as process:
        wait_for(lambda: checkpointed(run), "the first checkpoint", timeout_s=120)
        holder = working_on(project.database, "chat")
        assert holder == Holder.of(run.id, process.pid)
        with pytest.raises(ConflictError, match=f"chat is being trained by {run.id}"):
            new_run(project)
        with pytest.raises(ConflictError, match="nothing to resume"):
            resumable_run(project.database, "chat")
        process.kill()
    assert RunStore(project.database).get(run.id).state is RunState.RUNNING
    subprocess.run(command, env=environment, check=True)
    assert RunStore(project.database).get(run.id).state is RunState.SUCCEEDED


def test_the_childs_error_reaches_the_parent(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    add_ratings(project.database, 40, liked_share=1.0)
    run = new_run(project)
    with pytest.raises(InvalidInputError, match=r"all .* usable ratings are likes"):
        launch_run(project.settings, project.database, run)
    assert RunStore(project.database).get(run.id).state is RunState.FAILED
    with pytest.raises(NotFoundError, match="no unfinished run"):
        resumable_run(project.database, "chat")
    assert working_on(project.database, "chat") is None
    project.database.dispose()


def test_a_run_that_dies_again_and_again_is_given_up(tmp_path: Path) -> None:
    project = make_project(tmp_path)
    run = new_run(project)
    store = RunStore(project.database)
    for _ in range(MAX_ATTEMPTS):
        store.start(run.id)
    with pytest.raises(ScionError, match=f"died {MAX_ATTEMPTS} times"):
        launch_run(project.settings, project.database, store.get(run.id))
    assert store.get(run.id).state is RunState.FAILED
    project.database.dispose()


@pytest.mark.slow
def test_the_daemon_stops_its_run_and_goes_on_with_it(tmp_path: Path) -> None:
    """`scion trainer` as a process of its own, twice: by ratings it starts a run, by SIGTERM it leaves it resumable."""
    project = make_project(
        tmp_path,
        trainer__kto__epochs=500,
        trainer__checkpoint_every_steps=EVERY_STEPS,
        trainer__min_new_ratings=10,
        trainer__check_interval_s=0.2,
    )
    add_ratings(project.database, 40)
    store = RunStore(project.database)
    command = [sys.executable, "-m", "scion_adapters.cli.main", "--config", str(project.file), "trainer"]
    stopped_at = 0
    for attempt in (1, 2):
        with subprocess.Popen(command) as daemon:
            wait_for(
                lambda before=stopped_at: (
                    (run := store.newest("chat")) is not None and max([0, *losses(run)]) > before + EVERY_STEPS
                ),
                f"progress of attempt {attempt}",
                timeout_s=120,
            )
            daemon.terminate()
        assert daemon.returncode == 0
        run = store.list()[0]
        stopped_at = max(losses(run))
        assert (run.state, run.attempt) == (RunState.QUEUED, attempt)
        assert f"stopped at step {stopped_at}" in (run.error or "")
        assert working_on(project.database, "chat") is None
    assert len(store.list()) == 1
    assert steps_done(run) == list(range(1, stopped_at + 1))
    project.database.dispose()


def test_a_child_keeps_no_freed_activations_unless_told_otherwise(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(MALLOC_THRESHOLD_ENV, raising=False)
    assert child_environment(project.settings)[MALLOC_THRESHOLD_ENV] == str(8 << 20)
    monkeypatch.setenv(MALLOC_THRESHOLD_ENV, "1048576")
    assert child_environment(project.settings)[MALLOC_THRESHOLD_ENV] == "1048576"
