"""`scion train --estimate` on a real base: figures for every recipe, without loading anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from scion_adapters.settings import CONFIG_ENV
from scion_trainer import cli, estimation
from scion_trainer.memory import OutOfMemoryError
from scion_trainer.recipes import RECIPES
from scion_trainer.runs import RunStore
from tests.helpers.tiny_model import build_tiny_model
from tests.helpers.training import make_project


def invoke(*arguments: str) -> Any:
    application = typer.Typer()
    cli.register(application)
    return CliRunner().invoke(application, ["train", "chat", "--estimate", *arguments])


def test_the_command_loads_nothing_and_names_every_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = make_project(tmp_path, base=build_tiny_model(tmp_path / "base"))
    monkeypatch.setenv(CONFIG_ENV, str(project.file))
    monkeypatch.setattr("scion_trainer.base.load_base", lambda *_: pytest.fail("the base was loaded"))
    result = invoke("--json")
    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert [entry["recipe"] for entry in found] == list(RECIPES)
    assert all(entry["fits"] and entry["total_bytes"] > entry["base_bytes"] > 0 for entry in found)

    monkeypatch.setattr(estimation, "available_bytes", lambda _device: 1 << 20)
    refused = invoke("--recipe", "dpo")
    assert refused.exit_code == OutOfMemoryError.exit_code
    assert "no micro-batch" in refused.stdout
    assert RunStore(project.database).list() == []
    project.database.dispose()
