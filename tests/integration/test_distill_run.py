"""Distillation on a tiny random base: a local teacher answers what users disliked, and the adapter learns it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from scion_adapters.errors import InvalidInputError, UnavailableError
from scion_adapters.records import RunState
from scion_trainer.execution import execute
from scion_trainer.launch import create_run
from scion_trainer.progress import read_metrics
from scion_trainer.recipes.distill import FILTERED_FILE
from scion_trainer.runs import RunStore
from scion_trainer.stopping import RunInterruptedError
from tests.helpers.teacher import FakeTeacher, serve_teacher
from tests.helpers.tiny_model import build_tiny_model
from tests.helpers.training import Project, add_ratings, make_project


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture
def teacher() -> Iterator[FakeTeacher]:
    def says(prompt: str) -> tuple[str, str]:
        return ("cut", "length") if prompt.endswith("3?") else ("it is as the teacher says.", "stop")

    with serve_teacher(FakeTeacher(says=says)) as teacher:
        yield teacher


@pytest.fixture
def project(tmp_path: Path, base: Path, teacher: FakeTeacher) -> Iterator[Project]:
    project = make_project(
        tmp_path,
        base=base,
        trainer__distill__teacher_url=teacher.url,
        trainer__distill__teacher_model="large",
        trainer__distill__min_answers=8,
        trainer__distill__batch_size=8,
        trainer__distill__epochs=2,
    )
    add_ratings(project.database, 40, liked_share=0.3)
    yield project
    project.database.dispose()


def test_the_teachers_answers_are_learned_and_named_in_the_lineage(project: Project, teacher: FakeTeacher) -> None:
    run = create_run(project.settings, project.database, "chat", "distill", actor="test")
    version = execute(project.settings, project.database, run.id)
    assert version is not None
    distilled = version.metrics["distilled"]
    assert distilled["asked"] == len(teacher.asked) > 15  # dislikes only
    assert distilled["taught"] + sum(distilled["left_out"].values()) == distilled["asked"]
    assert distilled["left_out"].keys() <= {"cut_off"}
    assert (distilled["teacher"], distilled["teacher_models"], distilled["filter"]) == (
        "large",
        ["teacher-1"],
        "checks",
    )
    lineage = json.loads((Path(run.directory) / "export" / "scion.json").read_text())
    assert lineage["distilled"] == distilled
    assert (lineage["snapshot"], lineage["recipe"]) == (version.snapshot_id, "distill")
    losses = version.metrics["curves"]["loss"]
    assert losses[-1] < losses[0]


def test_a_run_that_goes_on_asks_nothing_again(project: Project, teacher: FakeTeacher) -> None:
    run = create_run(project.settings, project.database, "chat", "distill", actor="test")
    directory = Path(run.directory)
    with pytest.raises(RunInterruptedError, match="stopped at step"):
        execute(project.settings, project.database, run.id, stop_requested=lambda: len(read_metrics(directory)) >= 3)
    num_asked = len(teacher.asked)
    execute(project.settings, project.database, run.id)
    assert len(teacher.asked) == num_asked
    steps = [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))


def test_a_reward_model_that_passed_keeps_only_what_is_better(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    reward_run = create_run(project.settings, project.database, "chat", "reward", actor="test")
    execute(project.settings, project.database, reward_run.id)
    directory = Path(reward_run.directory) / "reward_model"
    monkeypatch.setattr("scion_trainer.execution.newest_reward_model", lambda *_: directory)
    scored: list[list[float]] = []

    from scion_trainer.reward.model import RewardModel

    penalised = RewardModel.penalised

    def watch(self: RewardModel, scores: Any) -> Any:
        result = penalised(self, scores)
        scored.append(result.tolist())
        return result

    monkeypatch.setattr(RewardModel, "penalised", watch)
    run = create_run(project.settings, project.database, "chat", "distill", actor="test")
    version = None
    with suppress(InvalidInputError):  # a random base may prefer too few of them; the choice is what is tested
        version = execute(project.settings, project.database, run.id)
    (scores,) = scored
    expected = sum(ours > theirs for ours, theirs in zip(scores[::2], scores[1::2], strict=True))
    chosen = json.loads((Path(run.directory) / FILTERED_FILE).read_text())
    assert len(chosen["kept"]) == expected
    assert chosen["left_out"].get("not_better", 0) == len(scores) // 2 - expected
    assert chosen["filter"] == f"reward model {reward_run.id}"
    if version is not None:
        assert version.metrics["distilled"]["taught"] == expected


def test_a_teacher_that_is_away_leaves_a_run_that_can_go_on(project: Project, teacher: FakeTeacher) -> None:
    from scion_trainer import run as run_module

    teacher.refusals = [500]
    run = create_run(project.settings, project.database, "chat", "distill", actor="test")
    status = run_module._attempt(project.settings, project.database, run, lambda: False)
    assert status == UnavailableError.exit_code
    waiting = RunStore(project.database).get(run.id)
    assert (waiting.state, "go on later with --resume" in (waiting.error or "")) == (RunState.QUEUED, True)
    assert execute(project.settings, project.database, run.id) is not None


def test_without_a_teacher_it_says_what_to_set(tmp_path: Path, base: Path) -> None:
    project = make_project(tmp_path, base=base)
    add_ratings(project.database, 40, liked_share=0.3)
    run = create_run(project.settings, project.database, "chat", "distill", actor="test")
    with pytest.raises(InvalidInputError, match=r"trainer\.distill\.teacher_url.*users' prompts are sent there"):
        execute(project.settings, project.database, run.id)
    project.database.dispose()
