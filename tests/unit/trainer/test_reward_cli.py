"""What `scion train --recipe reward` and the daemon say of a run whose product is a reward model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from scion_adapters.errors import RejectedError
from scion_adapters.records import Run
from scion_adapters.settings import CONFIG_ENV
from scion_trainer import cli, followup, launch
from scion_trainer import daemon as daemon_module
from scion_trainer.daemon import ChildLauncher
from scion_trainer.reward.store import GATE_METRIC
from scion_trainer.runs import RunStore
from tests.helpers.training import Project, make_project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    base = tmp_path / "base"
    base.mkdir()
    project = make_project(tmp_path, base=base)
    monkeypatch.setenv(CONFIG_ENV, str(project.file))
    monkeypatch.setattr(followup, "evaluate_version", lambda *_, **__: pytest.fail("there is no version to evaluate"))
    yield project
    project.database.dispose()


def made_reward_model(verdict: str) -> Any:
    """In the place of a launch: the run succeeded without a version."""

    def fake(_settings: Any, database: Any, run: Run, **_: Any) -> Run:
        gate = {"verdict": verdict, "reason": "auroc 0.912", "figures": {"auroc": 0.912}}
        metrics = {"rows": 40, "members": 3, "seconds": 7, GATE_METRIC: gate, "reward_model": "runs/x/reward_model"}
        return RunStore(database).succeed(run.id, candidate=None, metrics=metrics)

    return fake


def invoke(*arguments: str) -> Any:
    application = typer.Typer()
    cli.register(application)
    return CliRunner().invoke(application, list(arguments), catch_exceptions=False)


@pytest.mark.parametrize(
    ("verdict", "exit_code", "next_command"),
    [
        ("pass", 0, "scion train chat --recipe ppo"),
        ("inconclusive", 0, "scion runs show"),
        ("fail", RejectedError.exit_code, "scion runs show"),
    ],
)
def test_the_verdict_is_told_and_what_to_type_next(
    project: Project, monkeypatch: pytest.MonkeyPatch, verdict: str, exit_code: int, next_command: str
) -> None:
    monkeypatch.setattr(launch, "launch_run", made_reward_model(verdict))
    result = invoke("train", "chat", "--recipe", "reward")
    assert result.exit_code == exit_code
    assert f"{verdict}: auroc 0.912" in result.stdout
    assert f"next: {next_command}" in result.stdout


def test_json_is_one_document(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "launch_run", made_reward_model("pass"))
    document = json.loads(invoke("train", "chat", "--recipe", "reward", "--json").stdout)
    assert (document["version"], document["reward_model"]) == (None, "runs/x/reward_model")
    assert document["run"]["metrics"][GATE_METRIC]["verdict"] == "pass"


def test_the_daemon_follows_up_on_versions_only(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon_module, "launch_run", made_reward_model("pass"))
    monkeypatch.setattr(daemon_module, "follow_up", lambda *_, **__: pytest.fail("there is no version"))
    run = ChildLauncher(project.settings, project.database).start("chat", "reward")
    assert run.candidate is None
