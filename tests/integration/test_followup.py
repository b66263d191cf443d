"""What follows a run: an accepted candidate's rollout begins, and the first ones wait for a person."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from scion_adapters.records import RolloutState, Run
from scion_adapters.rollouts import open_rollouts
from scion_adapters.settings import load_settings
from scion_trainer.config import run_config
from scion_trainer.followup import Followed, follow_up
from scion_trainer.runs import RunStore
from tests.helpers.rollouts import add_version
from tests.helpers.training import Project, make_project


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    project = make_project(tmp_path, base=tmp_path)
    for number in (1, 2):
        add_version(project.database, number)
    yield project
    project.database.dispose()


def follow(project: Project, candidate: int, **gates: int) -> Followed:
    settings = load_settings(project.file, overrides={"gates": gates})
    runs = RunStore(project.database)
    made: Run = runs.create("chat", run_config(settings, "kto"), parent=0, directory=project.directory, actor="test")
    run = runs.succeed(made.id, candidate=candidate, metrics={})
    return follow_up(settings, project.database, run, evaluate=False, rollout=True, actor="trainer")


def test_the_first_versions_wait_for_a_person_and_the_note_says_how_to_approve(project: Project) -> None:
    followed = follow(project, 1, approve_first=1)
    assert followed.rollout is not None
    assert followed.rollout.state is RolloutState.UNAPPROVED
    assert "scion rollout approve chat" in followed.note
    open_rollouts(project.settings, project.database).promote("chat", actor="ann")
    later = follow(project, 2, approve_first=1)
    assert later.rollout is not None
    assert (later.rollout.state, later.note) == (RolloutState.PROGRESSING, "")


def test_three_wait_unless_the_settings_say_otherwise(project: Project) -> None:
    waiting = follow(project, 1).rollout
    assert waiting is not None
    assert waiting.state is RolloutState.UNAPPROVED
    open_rollouts(project.settings, project.database).abort("chat", actor="ann")
    at_once = follow(project, 1, approve_first=0).rollout
    assert at_once is not None
    assert at_once.state is RolloutState.PROGRESSING
