"""Whole PPO runs on a tiny random base: ratings and a reward model that passed its gate in, a candidate out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from scion_adapters.errors import InvalidInputError, NotFoundError
from scion_adapters.fingerprint import base_info
from scion_adapters.preflight import AdapterLimits, check_adapter
from scion_adapters.records import Run, RunState
from scion_adapters.sections.serving import LORA_TARGETS
from scion_trainer import execution, lowering
from scion_trainer.config import run_config
from scion_trainer.execution import execute
from scion_trainer.launch import create_run
from scion_trainer.lora import ADAPTER
from scion_trainer.progress import read_metrics
from scion_trainer.runs import RunStore
from scion_trainer.stopping import RunInterruptedError
from tests.helpers.reward import add_reward_model
from tests.helpers.tiny_model import build_tiny_model
from tests.helpers.training import Project, add_ratings, make_champion, make_project


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture
def project(tmp_path: Path, base: Path) -> Iterator[Project]:
    project = make_project(
        tmp_path,
        base=base,
        trainer__ppo__batch_size=8,
        trainer__ppo__max_tokens=8,
        trainer__ppo__epochs=0.8,
        trainer__ppo__passes=2,
        trainer__ppo__minibatches=2,
        trainer__checkpoint_every_steps=1,
    )
    add_ratings(project.database, 40)
    yield project
    project.database.dispose()


def create_ppo_run(project: Project) -> Run:
    return create_run(project.settings, project.database, "chat", "ppo", actor="test")


def test_rated_prompts_and_a_reward_model_become_a_candidate(project: Project) -> None:
    reward_model = add_reward_model(project.settings, project.database)
    run = create_ppo_run(project)
    version = execute(project.settings, project.database, run.id)
    assert version is not None
    done = RunStore(project.database).get(run.id)
    assert (done.state, done.candidate, version.recipe) == (RunState.SUCCEEDED, version.number, "ppo")
    check_adapter(Path(done.directory) / "export", base_info(project.settings), AdapterLimits(16, LORA_TARGETS))
    metrics = done.metrics
    assert metrics["reward_model"] == str(reward_model)
    assert metrics["steps"] == len(metrics["curves"]["step"]) == -(-0.8 * metrics["prompts"] // 8)
    assert {"reward", "kl", "kl_to_base", "entropy", "clip_fraction", "answer_tokens"} <= set(metrics["curves"])
    assert metrics["final"]["kl_to_base"] != 0.0


def test_a_stopped_run_keeps_its_reward_model_and_ends_as_if_it_had_not(project: Project, tmp_path: Path) -> None:
    first = add_reward_model(project.settings, project.database)
    run = create_ppo_run(project)
    directory = Path(run.directory)
    with pytest.raises(RunInterruptedError, match="stopped at step 2"):
        execute(project.settings, project.database, run.id, stop_requested=lambda: len(read_metrics(directory)) >= 2)
    add_reward_model(project.settings, project.database)
    version = execute(project.settings, project.database, run.id)
    assert version is not None
    assert version.metrics["reward_model"] == str(first)

    # The same ratings and reward model, without a stop: the same weights, so the same digest.
    shutil.rmtree(Path(run.directory))
    whole = RunStore(project.database).create(
        "chat", run_config(project.settings, "ppo"), parent=0, directory=tmp_path / "whole", actor="test"
    )
    again = execute(project.settings, project.database, whole.id)
    assert again is not None
    assert again.metrics["curves"]["reward"] == version.metrics["curves"]["reward"]
    assert again.metrics["final"] == version.metrics["final"]


def test_a_parent_is_gone_on_from(project: Project) -> None:
    add_reward_model(project.settings, project.database)
    first = execute(project.settings, project.database, create_ppo_run(project).id)
    assert first is not None
    make_champion(project, first.ref)
    second = execute(project.settings, project.database, create_ppo_run(project).id)
    assert second is not None
    assert (second.parent, second.digest != first.digest) == (first.number, True)
    curve = second.metrics["curves"]
    assert curve["kl"][0] == pytest.approx(0, abs=1e-4)  # from the parent
    assert abs(curve["kl_to_base"][0]) > 1e-4  # and the base is further


@pytest.mark.parametrize("verdict", [None, "fail", "inconclusive"])
def test_without_a_reward_model_that_passed_nothing_is_trained(project: Project, verdict: str | None) -> None:
    if verdict is not None:
        add_reward_model(project.settings, project.database, verdict=verdict)
    with pytest.raises(NotFoundError, match=r"no reward model .* passed its gate.*--recipe reward"):
        execute(project.settings, project.database, create_ppo_run(project).id)


def test_answers_longer_than_there_is_room_for_are_refused(tmp_path: Path, base: Path) -> None:
    project = make_project(tmp_path, base=base, trainer__ppo__max_tokens=240, trainer__max_length=250)
    add_ratings(project.database, 40)
    add_reward_model(project.settings, project.database)
    with pytest.raises(InvalidInputError, match=r"0 of \d+ prompts leave room for trainer\.ppo\.max_tokens = 240"):
        execute(project.settings, project.database, create_ppo_run(project).id)
    project.database.dispose()


def test_nothing_of_ppo_is_left_on_the_model(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after (KL, parity, export) finds the model as other recipes leave it."""
    found = []
    real = lowering.train_within_memory

    def spy(*arguments: object, **options: object) -> object:
        context, metrics = real(*arguments, **options)  # type: ignore[arg-type]
        found.append(context.model)
        return context, metrics

    monkeypatch.setattr(execution, "train_within_memory", spy)
    add_reward_model(project.settings, project.database)
    execute(project.settings, project.database, create_ppo_run(project).id)
    assert list(found[0].peft_config) == [ADAPTER]
    assert found[0].active_adapters == [ADAPTER]
