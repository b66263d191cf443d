"""DPO on a tiny random base in NF4: from corrections and thumbs to a candidate that prefers what users prefer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from scion_adapters.errors import InvalidInputError
from scion_adapters.registry import open_registry
from scion_trainer.execution import execute
from scion_trainer.launch import create_run
from scion_trainer.progress import read_metrics
from scion_trainer.runs import RunStore
from scion_trainer.stopping import RunInterruptedError
from tests.helpers.tiny_model import build_tiny_model
from tests.helpers.training import Project, add_ratings, make_project


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture
def project(tmp_path: Path, base: Path) -> Iterator[Project]:
    project = make_project(tmp_path, base=base, trainer__dpo__batch_size=8, trainer__dpo__epochs=3)
    add_ratings(project.database, 40, corrections=36)
    yield project
    project.database.dispose()


def test_pairs_raise_the_margin_and_the_likelihood_of_what_is_preferred(project: Project) -> None:
    run = create_run(project.settings, project.database, "chat", "dpo", actor="test")
    version = execute(project.settings, project.database, run.id)
    assert version is not None
    assert version.recipe == "dpo"
    records = read_metrics(Path(run.directory))
    assert records[0]["rewards/chosen"] == records[0]["rewards/rejected"] == 0.0  # it begins at the reference
    assert records[-1]["rewards/margins"] > 1.0
    assert records[-1]["logps/chosen"] > records[0]["logps/chosen"]
    assert version.metrics["pairs"] == version.metrics["rows"] >= 25  # of 36 corrections, less the held-out users
    assert open_registry(project.settings, project.database).version(version.ref).rank == 4


def test_a_stopped_run_goes_on_from_the_same_reference(project: Project) -> None:
    whole = create_run(project.settings, project.database, "chat", "dpo", actor="test")
    execute(project.settings, project.database, whole.id)

    run = create_run(project.settings, project.database, "chat", "dpo", actor="test")
    directory = Path(run.directory)
    with pytest.raises(RunInterruptedError, match="stopped at step"):
        execute(project.settings, project.database, run.id, stop_requested=lambda: len(read_metrics(directory)) >= 5)
    execute(project.settings, project.database, run.id)
    steps = [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    expected = [record["rewards/margins"] for record in read_metrics(Path(whole.directory))]
    assert [record["rewards/margins"] for record in read_metrics(directory)] == pytest.approx(expected, abs=0.05)
    assert RunStore(project.database).get(run.id).attempt == 2


def test_thumbs_on_different_prompts_are_no_pairs(tmp_path: Path, base: Path) -> None:
    project = make_project(tmp_path, base=base)
    add_ratings(project.database, 40)
    run = create_run(project.settings, project.database, "chat", "dpo", actor="test")
    with pytest.raises(InvalidInputError, match="preference pairs"):
        execute(project.settings, project.database, run.id)
    project.database.dispose()
