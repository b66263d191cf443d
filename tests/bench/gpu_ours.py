"""`python -m tests.bench.gpu_ours JSON OUTPUT`: this project's SFT or KTO recipe on the task, as a run trains."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

from scion_adapters.fingerprint import base_info
from scion_adapters.settings import load_settings
from scion_trainer.base import load_base
from scion_trainer.config import run_config
from scion_trainer.defaults import resolve
from scion_trainer.estimation import Request
from scion_trainer.examples import prepare
from scion_trainer.lora import start_adapter
from scion_trainer.progress import Progress, read_metrics
from scion_trainer.recipes import RECIPES, RunContext
from scion_trainer.recipes.recipe import Example
from tests.bench.gpu_task import Tuning, texts
from tests.bench.ppo_task import Record, device_peak_bytes

_IMPORTED_BY_RECIPES = ("datasets", "scion_trainer.recipes.kto_trainer", "trl.trainer.sft_trainer")
"""When they train: imports take seconds, and TRL's side has made its own before its training is timed."""


def main() -> None:
    for name in _IMPORTED_BY_RECIPES:
        import_module(name)
    task = Tuning(**json.loads(sys.argv[1])["task"])
    with tempfile.TemporaryDirectory() as directory:
        record = run(task, Path(directory))
    record.write(Path(sys.argv[2]))


def run(task: Tuning, home: Path) -> Record:
    longest = task.prompt_tokens + task.answer_tokens + 8  # and what the template adds
    (home / "scion.toml").write_text("", encoding="utf-8")
    settings = load_settings(
        home / "scion.toml",
        overrides={
            "base": {"model": task.model},
            "trainer": {
                "max_length": longest,
                "micro_batch_size": task.at_once,
                "checkpoint_every_steps": 10**6,
                "threads": task.threads,
                "seed": task.seed,
                "lora": {"rank": task.rank, "alpha": 2 * task.rank},
                task.recipe: {"learning_rate": task.learning_rate, "epochs": 1, "batch_size": task.batch_size},
            },
        },
    )
    loading = time.monotonic()
    base, loaded = base_info(settings), load_base(settings)
    examples = [
        Example(
            ({"role": "user", "content": text.question},), text.answer, text.liked if task.recipe == "kto" else None
        )
        for text in texts(task, int(loaded.model.config.vocab_size))
    ]
    prepared = prepare(examples, loaded.tokenizer, max_length=longest)
    config = resolve(
        run_config(settings, task.recipe),
        base,
        num_examples=len(prepared.examples),
        mean_answer_tokens=prepared.mean_answer_tokens,
    )
    request = Request(
        base,
        config,
        quantized=True,
        rank=task.rank,
        longest_tokens=prepared.longest_tokens,
        has_parent=False,
        device_type=loaded.model.device.type,
    )
    predicted = request.predict(task.at_once, prepared.longest_tokens, task.rank)
    began = time.monotonic()
    model, _ = start_adapter(loaded, config, None)
    with Progress(home) as progress:
        context = RunContext(
            config=config,
            model=model,
            tokenizer=loaded.tokenizer,
            examples=prepared.examples,
            directory=home,
            resume_from=None,
            gradient_checkpointing=predicted.gradient_checkpointing,
            progress=progress,
            stop_requested=lambda: False,
            base=base,
            settings=settings,
        )
        RECIPES[task.recipe].train(context)
    ended = time.monotonic()
    seconds = [float(step["seconds"]) for step in read_metrics(home)]
    return Record(
        seconds=seconds,
        setup_s=ended - loading - sum(seconds),
        training_s=ended - began,
        note="recomputed activations" if predicted.gradient_checkpointing else "",
        device_peak_bytes=device_peak_bytes(),
        predicted_bytes=predicted.total_bytes,
    )


if __name__ == "__main__":
    main()
