"""`python -m tests.bench.ppo_ours JSON OUTPUT`: this project's PPO on the task, on one NF4 base.

The reward costs what a reward model costs, a forward of a role of its own; the score is then the task's reward. With
`engine` answers come from a vLLM of the run's own.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from scion_adapters.fingerprint import base_info
from scion_adapters.settings import Settings, load_settings
from scion_trainer.base import LoadedBase, load_base
from scion_trainer.config import run_config
from scion_trainer.lora import start_adapter
from scion_trainer.memory import estimate
from scion_trainer.ppo.options import PpoOptions
from scion_trainer.ppo.ppo import Job, train
from scion_trainer.progress import Progress, read_metrics
from scion_trainer.reward.model import Head, RewardModel
from scion_trainer.roles import Roles, reward_role
from scion_trainer.rollouts.engine import EngineSource
from scion_trainer.rollouts.local import LocalRollouts
from scion_trainer.rollouts.sampling import Sampling
from scion_trainer.rollouts.types import Rollout, RolloutSource
from tests.bench.ppo_task import LORA_RANK, Record, Task, device_peak_bytes, prompts, read_arguments, reward_of


def main() -> None:
    task, output, more = read_arguments(sys.argv)
    torch.set_num_threads(task.threads)
    with tempfile.TemporaryDirectory() as directory:
        record = run(task, Path(directory), with_engine=bool(more.get("engine")))
    record.write(output)


def run(task: Task, home: Path, *, with_engine: bool) -> Record:
    settings = _settings(task, home)
    base = load_base(settings)
    config = replace(run_config(settings, "ppo"), seed=task.seed)
    roles = Roles(start_adapter(base, config, None)[0])
    vocab = int(base.model.config.vocab_size)
    roles.add(reward_role(0))
    judge = RewardModel(roles, [Head(base.model.config.hidden_size).to(roles.device)])

    def reward(rollouts: Sequence[Rollout]) -> torch.Tensor:
        for start in range(0, len(rollouts), task.at_once):
            part = rollouts[start : start + task.at_once]
            judge.score_sequences([rollout.prompt_ids + rollout.response_ids for rollout in part])
        return torch.tensor([reward_of(rollout.response_ids, vocab) for rollout in rollouts])

    source = _source(task, settings, base, roles, home, with_engine=with_engine)
    options = PpoOptions(
        steps=task.num_updates,
        batch_size=task.batch_size,
        learning_rate=task.learning_rate,
        max_tokens=task.response_tokens,
        passes=task.passes,
        minibatches=1,
        micro_batch_size=task.at_once,
        missing_eos_penalty=0.0,
        reference_answers=task.batch_size,
        checkpoint_every_steps=10**6,
        seed=task.seed,
    )
    predicted = estimate(
        base_info(settings),
        replace(
            config,
            batch_size=task.batch_size,
            options={**config.options, "max_tokens": task.response_tokens, "members": 1, "minibatches": 1},
        ),
        quantized=True,
        rank=LORA_RANK,
        micro_batch_size=task.at_once,
        longest_tokens=task.prompt_tokens,
        device_type=roles.device.type,
    )
    if predicted.gradient_checkpointing:
        roles.checkpoint_activations()
    began = time.monotonic()
    with Progress(home) as progress:
        try:
            train(
                Job(
                    roles=roles,
                    prompts=prompts(task, vocab, task.batch_size * task.num_updates),
                    source=source,
                    reward=reward,
                    options=options,
                    directory=home,
                    progress=progress,
                )
            )
        finally:
            source.close()
    steps = read_metrics(home)
    seconds = [float(step["seconds"]) for step in steps]
    return Record(
        seconds=seconds,
        rewards=[float(step["reward"]) for step in steps],
        setup_s=time.monotonic() - began - sum(seconds),
        note=f"mismatch {steps[0]['mismatch']:.4f} nats",
        device_peak_bytes=device_peak_bytes(),
        predicted_bytes=predicted.total_bytes,
    )


def _source(
    task: Task, settings: Settings, base: LoadedBase, roles: Roles, home: Path, *, with_engine: bool
) -> RolloutSource:
    if not with_engine:
        return LocalRollouts(
            roles, stop_ids=[base.tokenizer.eos_token_id], temperature=1.0, max_tokens=task.response_tokens
        )
    return EngineSource(
        settings,
        base_info(settings),
        Sampling(task.response_tokens),
        home / "engine",
        actor="bench",
        max_length=task.prompt_tokens + task.response_tokens,
        say=lambda text: print(text, file=sys.stderr),
    )


def _settings(task: Task, home: Path) -> Settings:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    overrides = {
        "base": {"model": task.model},
        "trainer": {"threads": task.threads, "lora": {"rank": LORA_RANK, "alpha": 2 * LORA_RANK}},
    }
    (home / "scion.toml").write_text("", encoding="utf-8")
    return load_settings(home / "scion.toml", overrides=overrides)


if __name__ == "__main__":
    main()
