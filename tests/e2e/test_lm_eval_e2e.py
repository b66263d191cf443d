"""The real lm-evaluation-harness on the real server, with a task of our own and no network. Skipped without it.

`SCION_GATES__LM_EVAL_COMMAND` names the program of another environment.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scion_adapters.errors import NotFoundError
from scion_adapters.settings import Settings, load_settings
from scion_trainer.gates.lm_eval import decide
from scion_trainer.gates.retention import load_items
from scion_trainer.gates.types import Verdict
from scion_trainer.harness import find_program, run_harness
from tests.e2e.conftest import ServerWorld

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]  # the program itself takes a while to start
NUM_DOCUMENTS = 32

TASK = """\
task: capitals_and_more
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prefix}}}}"
doc_to_choice: "{{{{[answer, wrong]}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list:
  - metric: acc
    higher_is_better: true
"""
"""Right answer against another question's, as a continuation of the item's prefix."""


@pytest.fixture
def settings(world: ServerWorld, tmp_path: Path) -> Settings:
    items = load_items(load_settings(world.server.home / "scion.toml"))
    rows = [
        {"prefix": item.prefix, "answer": item.answer, "wrong": items[i - 7].answer}
        for i, item in enumerate(items[:NUM_DOCUMENTS])
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "task.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    gates = {"lm_eval_tasks": ["capitals_and_more"], "lm_eval_include": str(tmp_path), "lm_eval_timeout_s": 420.0}
    settings = load_settings(world.server.home / "scion.toml", overrides={"gates": gates})
    try:
        find_program(settings.gates.lm_eval_command)
    except NotFoundError as error:
        pytest.skip(str(error))
    return settings


def test_a_task_of_ones_own_is_scored_by_document_for_a_version_and_for_the_base(
    world: ServerWorld, settings: Settings
) -> None:
    version = world.registry.version(world.registry.resolve("chat"))
    key = version.evaluation_key
    ours = run_harness(settings, str(version.ref), evaluation_key=key, max_length=256)
    base = run_harness(settings, settings.base.served_name, evaluation_key=None, max_length=256)
    assert ours["capitals_and_more"].metric == base["capitals_and_more"].metric == "acc"
    assert len(ours["capitals_and_more"].scores) == len(base["capitals_and_more"].scores) == NUM_DOCUMENTS
    assert base["capitals_and_more"].mean > 0.6  # it was trained on such facts; a coin would find half
    assert decide(base, base, bounds=settings.gates).verdict is Verdict.PASS
