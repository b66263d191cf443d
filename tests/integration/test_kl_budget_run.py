"""A run measures its KL from the base and publishes nothing beyond the budget, whatever its parent is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from scion_adapters.errors import RejectedError
from scion_adapters.records import RunState
from scion_adapters.registry import open_registry
from scion_adapters.settings import load_settings
from scion_trainer import run as run_module
from scion_trainer.execution import execute
from scion_trainer.launch import create_run
from scion_trainer.runs import RunStore
from tests.helpers.tiny_model import build_tiny_model
from tests.helpers.training import add_ratings, make_project


def test_a_run_over_its_budget_fails_with_the_figure(tmp_path: Path) -> None:
    project = make_project(tmp_path, base=build_tiny_model(tmp_path / "base"))
    add_ratings(project.database, 40)
    run = create_run(project.settings, project.database, "chat", "kto", actor="test")
    version = execute(project.settings, project.database, run.id)
    assert version is not None
    figure = version.metrics["kl_to_base"]
    assert figure > 0.0
    assert version.metrics["kl_to_base_tokens"] > 0

    tight = replace(project, settings=load_settings(project.file, overrides={"trainer": {"kl_budget": figure / 2}}))
    run = create_run(tight.settings, tight.database, "chat", "kto", actor="test")
    status = run_module._attempt(tight.settings, tight.database, run, lambda: False)
    failed = RunStore(tight.database).get(run.id)
    assert (status, failed.state, failed.candidate) == (RejectedError.exit_code, RunState.FAILED, None)
    assert failed.error is not None
    assert "trainer.kl_budget allows" in failed.error
    assert failed.metrics["kl_to_base"] == pytest.approx(figure, rel=0.01)  # the same run at the same seed
    assert len(open_registry(tight.settings, tight.database).versions("chat")) == 1
    project.database.dispose()
