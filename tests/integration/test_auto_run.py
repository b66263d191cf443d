"""`--recipe auto` on real runs: the run becomes one of the chosen recipe, says why, and keeps to it when resumed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from scion_adapters.tables import events
from scion_trainer.execution import execute
from scion_trainer.launch import create_run
from scion_trainer.progress import read_metrics
from scion_trainer.runs import RunStore
from scion_trainer.stopping import RunInterruptedError
from tests.helpers.tiny_model import build_tiny_model
from tests.helpers.training import Project, add_ratings, make_project


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    project = make_project(tmp_path, base=build_tiny_model(tmp_path / "base"), trainer__recipe="auto")
    yield project
    project.database.dispose()


def test_thumbs_become_a_run_of_kto_that_stays_one(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    add_ratings(project.database, 40)
    run = create_run(project.settings, project.database, "chat", "auto", actor="test")
    assert run.recipe == "auto"
    directory = Path(run.directory)
    with pytest.raises(RunInterruptedError):
        execute(project.settings, project.database, run.id, stop_requested=lambda: len(read_metrics(directory)) >= 3)
    assert RunStore(project.database).get(run.id).recipe == "kto"
    add_ratings(project.database, 40, liked_share=1.0, seed=1)  # what came since does not matter to this run
    version = execute(project.settings, project.database, run.id)

    metrics = RunStore(project.database).get(run.id).metrics
    assert version is not None
    assert (version.recipe, metrics["chosen_recipe"]) == ("kto", "kto")
    assert "single thumbs are what kto learns from" in metrics["chosen_why"]
    assert metrics["chosen_from"]["liked"] + metrics["chosen_from"]["disliked"] == metrics["rows"]
    assert capsys.readouterr().err.count("recipe kto: ") == 1
    with project.database.read() as connection:
        query = sa.select(events.c.reason, events.c.data).where(events.c.kind == "run.recipe_chosen")
        (event,) = connection.execute(query).all()
    assert (event.reason, event.data["recipe"]) == (metrics["chosen_why"], "kto")


def test_likes_and_corrections_become_a_run_of_sft_with_its_settings(project: Project) -> None:
    add_ratings(project.database, 40, liked_share=1.0, corrections=30)
    run = create_run(project.settings, project.database, "chat", "auto", actor="test")
    version = execute(project.settings, project.database, run.id)
    assert version is not None
    assert version.recipe == "sft"
    config = RunStore(project.database).get(run.id).config
    assert (config["recipe"], config["epochs"], config["options"]) == ("sft", 2, {})
