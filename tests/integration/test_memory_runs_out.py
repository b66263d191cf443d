"""Memory that runs out in the middle of a real run: it goes on from its checkpoint with half as many at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trl import SFTTrainer

from scion_trainer import kl
from scion_trainer.execution import execute
from scion_trainer.launch import create_run
from scion_trainer.progress import read_metrics
from scion_trainer.runs import RunStore
from tests.helpers.tiny_model import build_tiny_model
from tests.helpers.training import add_ratings, make_project


@pytest.mark.parametrize("recipe", ["sft", "kto", "dpo"])
def test_the_run_ends_as_if_it_had_begun_with_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    from trl import DPOTrainer, KTOTrainer

    project = make_project(tmp_path, base=build_tiny_model(tmp_path / "base"), trainer__dpo__batch_size=8)
    add_ratings(project.database, 40, corrections=36)
    measure = kl.measure
    sampled_at_once: list[int] = []

    def note_at_once(*args: Any, at_once: int, **named: Any) -> kl.Divergence | None:
        sampled_at_once.append(at_once)
        return measure(*args, at_once=at_once, **named)

    monkeypatch.setattr(kl, "measure", note_at_once)
    whole = create_run(project.settings, project.database, "chat", recipe, actor="test")
    expected = execute(project.settings, project.database, whole.id)

    trainer = {"sft": SFTTrainer, "kto": KTOTrainer, "dpo": DPOTrainer}[recipe]
    train_step = trainer.training_step
    failed: list[int] = []

    def fail_once(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 5 and not failed:
            failed.append(self.args.per_device_train_batch_size)
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
            )
        return train_step(self, *args, **kwargs)

    monkeypatch.setattr(trainer, "training_step", fail_once)
    run = create_run(project.settings, project.database, "chat", recipe, actor="test")
    version = execute(project.settings, project.database, run.id)

    assert failed == [8]
    assert expected is not None
    assert version is not None
    metrics = version.metrics
    assert (metrics["micro_batch_size"], metrics["out_of_memory"], metrics["attempts"]) == (4, 1, 1)
    assert RunStore(project.database).get(run.id).config["micro_batch_size"] == 4
    assert sampled_at_once == [8, 4]  # the KL check, too, keeps to what sufficed
    steps = [json.loads(line)["step"] for line in (Path(run.directory) / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, *range(4, expected.metrics["steps"] + 1)]  # on from the checkpoint of step 3
    losses = [record["loss"] for record in read_metrics(Path(run.directory))]
    assert losses[:3] == pytest.approx(expected.metrics["curves"]["loss"][:3])
    if recipe != "kto":  # its KL is estimated within what is in memory
        assert losses == pytest.approx(expected.metrics["curves"]["loss"], rel=0.1)
    project.database.dispose()
