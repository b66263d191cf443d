"""Other architectures than the demo's: NF4, a LoRA, a step of SFT and of KTO, sampling, and files that vLLM takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from scion_adapters.fingerprint import base_info
from scion_adapters.preflight import AdapterLimits, check_adapter
from scion_adapters.sections.serving import LORA_TARGETS
from scion_adapters.settings import load_settings
from scion_trainer import kl
from scion_trainer.base import load_base
from scion_trainer.chat_tokens import ChatTokens
from scion_trainer.config import run_config
from scion_trainer.defaults import resolve
from scion_trainer.lora import export_adapter, start_adapter
from scion_trainer.progress import Progress
from scion_trainer.recipes import RECIPES, Example, RunContext
from tests.helpers.tiny_model import ARCHITECTURES, build_tiny_model
from tests.helpers.training import snapshot_row

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_an_architecture_can_be_trained_and_exported(tmp_path: Path, architecture: str) -> None:
    base_directory = build_tiny_model(tmp_path / "base", architecture=architecture)
    trainer = {"threads": 1, "lora": {"rank": 4, "alpha": 8}}
    settings = load_settings(overrides={"base": {"model": str(base_directory)}, "trainer": trainer})
    base = base_info(settings)
    examples = tuple(
        Example(({"role": "user", "content": f"what is {i}?"},), f"it is {i}.", i % 2 == 0) for i in range(8)
    )
    parent: Path | None = None
    for recipe in ("sft", "kto"):  # the second goes on from the first
        config = replace(
            run_config(settings, recipe), batch_size=8, epochs=2.0, learning_rate=1e-2
        )  # the warm-up starts at 0
        config = resolve(config, base, num_examples=8, mean_answer_tokens=8.0)
        loaded = load_base(settings, device=torch.device("cpu"))
        model, shape = start_adapter(loaded, config, parent)
        directory = tmp_path / recipe
        directory.mkdir()
        with Progress(directory) as progress:
            measured = RECIPES[recipe].train(
                RunContext(
                    config=config,
                    model=model,
                    tokenizer=loaded.tokenizer,
                    examples=tuple(replace(e, label=None) for e in examples) if recipe == "sft" else examples,
                    directory=directory,
                    resume_from=None,
                    gradient_checkpointing=False,
                    progress=progress,
                    stop_requested=lambda: False,
                )
            )
        assert measured["steps"] == 2
        tokens = ChatTokens(loaded.tokenizer)
        prompts = kl.heldout_prompts([snapshot_row()], tokens, max_length=256)
        divergence = kl.measure(model, prompts, stop_ids=tokens.stop_ids())
        assert divergence is not None
        assert 0.0 < divergence.per_token < 10.0  # the steps moved it, and not beyond reason
        parent = export_adapter(model, directory / "export", base_model="base", lineage={})
        info = check_adapter(parent, base, AdapterLimits(16, LORA_TARGETS))
        assert info.rank == 4
        assert {module.rsplit(".", 1)[-1] for module in info.modules} == set(shape.target_modules) >= ATTENTION
