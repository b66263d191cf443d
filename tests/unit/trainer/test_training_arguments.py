"""The arguments that TRL's trainers get: the batch is the configuration's wherever the run is."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl import DPOConfig, KTOConfig, SFTConfig

from scion_adapters.settings import Settings
from scion_trainer.config import run_config
from scion_trainer.progress import Progress
from scion_trainer.recipes import RunContext
from scion_trainer.recipes.fit import training_arguments


def context(tmp_path: Path, recipe: str, device: str) -> RunContext:
    return RunContext(
        config=replace(
            run_config(Settings(), recipe), batch_size=8, micro_batch_size=4, epochs=1.0, learning_rate=1e-4
        ),
        model=SimpleNamespace(device=torch.device(device)),
        tokenizer=None,
        examples=(),
        directory=tmp_path,
        resume_from=None,
        gradient_checkpointing=False,
        progress=Progress(tmp_path, stream=StringIO()),
        stop_requested=lambda: False,
    )


@pytest.mark.parametrize("num_gpus", [0, 1, 2, 8])
@pytest.mark.parametrize(("kind", "recipe"), [(SFTConfig, "sft"), (KTOConfig, "kto"), (DPOConfig, "dpo")])
def test_a_run_is_on_one_device_however_many_are_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, recipe: str, num_gpus: int
) -> None:
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    arguments = training_arguments(kind, context(tmp_path, recipe, "cuda" if num_gpus else "cpu"), max_length=64)
    assert arguments.n_gpu == min(1, num_gpus)
    assert (arguments.train_batch_size, arguments.gradient_accumulation_steps) == (4, 2)
    assert arguments.max_length == 64
