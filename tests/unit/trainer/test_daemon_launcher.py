"""The daemon's launcher without processes: what follows a run, and that a stop reaches children that come late."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scion_adapters.records import Run
from scion_trainer import daemon as daemon_module
from scion_trainer.daemon import ChildLauncher
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
