"""The daemon's launcher without processes: what follows a run, and that a stop reaches children that come late."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scion_adapters.errors import ConflictError
from scion_adapters.records import Run, RunState
from scion_trainer import daemon as daemon_module
from scion_trainer.daemon import ChildLauncher
from scion_trainer.launch import create_run, launch_run
from scion_trainer.run_lease import Holder, claim
from scion_trainer.runs import RunStore
from tests.helpers.training import Project, make_project


class FakeProcess:
    def __init__(self) -> None:
        self.signals: list[int] = []

    def send_signal(self, number: int) -> None:
        self.signals.append(number)


class Followed:
    class version:  # noqa: N801 - a field
        ref = "chat:1"
        state = "accepted"

    note = ""


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    project = make_project(tmp_path, base=tmp_path, trainer__rollout=False)
    yield project
    project.database.dispose()


def test_a_run_is_followed_by_gates_and_the_configured_rollout(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed: list[dict[str, Any]] = []

    def follow(*_: Any, **options: Any) -> type[Followed]:
        followed.append(options)
        return Followed

    monkeypatch.setattr(daemon_module, "launch_run", lambda _settings, _database, run, **_: run)
    monkeypatch.setattr(daemon_module, "follow_up", follow)
    run = ChildLauncher(project.settings, project.database).start("chat", "sft")
    assert (run.adapter, run.recipe, run.actor) == ("chat", "sft", "trainer")
    assert [(options["evaluate"], options["rollout"]) for options in followed] == [(True, False)]


def test_a_run_that_came_second_is_failed(project: Project) -> None:
    """Two processes created a run each before either of them took the lease."""
    run = create_run(project.settings, project.database, "chat", "kto", actor="test")
    claim(project.database, "chat", Holder.of("run-first"))
    with pytest.raises(ConflictError, match="being trained by run-first"):
        launch_run(project.settings, project.database, run)
    lost = RunStore(project.database).get(run.id)
    assert lost.state is RunState.FAILED
    assert "never started: adapter chat is being trained by run-first" in (lost.error or "")


def test_a_begun_run_that_may_not_go_on_now_waits(project: Project) -> None:
    store = RunStore(project.database)
    run = create_run(project.settings, project.database, "chat", "kto", actor="test")
    store.start(run.id)
    run = store.interrupt(run.id, "stopped at step 3")
    claim(project.database, "chat", Holder.of("run-first"))
    with pytest.raises(ConflictError):
        launch_run(project.settings, project.database, run)
    assert store.get(run.id) == run


def test_a_run_that_another_process_begins_is_that_processs(project: Project) -> None:
    run = create_run(project.settings, project.database, "chat", "kto", actor="test")
    claim(project.database, "chat", replace(Holder.of(run.id), host="elsewhere"))
    with pytest.raises(ConflictError):
        launch_run(project.settings, project.database, run)
    assert RunStore(project.database).get(run.id) == run


def test_a_stop_reaches_running_children_and_those_that_start_meanwhile(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = ChildLauncher(project.settings, project.database)
    early, late = FakeProcess(), FakeProcess()

    def fake(_settings: Any, _database: Any, run: Run, *, started: Callable[[Any], None]) -> Run:
        started(early)
        launcher.stop()
        started(late)
        return run

    monkeypatch.setattr(daemon_module, "launch_run", fake)
    monkeypatch.setattr(daemon_module, "follow_up", lambda *_, **__: Followed)
    launcher.start("chat", "kto")
    assert early.signals == [signal.SIGTERM]
    assert late.signals == [signal.SIGTERM]
    launcher.stop()  # nothing runs any more
    assert early.signals == [signal.SIGTERM]
