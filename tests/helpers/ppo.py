"""A small PPO on the tiny base, rewarded by a function: everything real but the reward model."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from scion_adapters.settings import Settings, load_settings
from scion_trainer.base import load_base
from scion_trainer.config import run_config
from scion_trainer.lora import start_adapter
from scion_trainer.ppo.options import PpoOptions
from scion_trainer.ppo.ppo import Job
from scion_trainer.progress import Progress
from scion_trainer.roles import Roles
from scion_trainer.rollouts.local import LocalRollouts
from scion_trainer.rollouts.types import Rollout

STOP_ID = 0  # <|end|> of the tiny model
PROMPTS = [(3, first, 4) for first in range(20, 36)]  # <|user|>, a letter, <|assistant|>

OPTIONS: dict[str, Any] = {
    "steps": 3,
    "batch_size": 8,
    "learning_rate": 3e-3,
    "max_tokens": 8,
    "passes": 2,
    "minibatches": 2,
    "missing_eos_penalty": 0.0,
    "checkpoint_every_steps": 1,
    "reference_answers": 8,
}


def ppo_settings(base: Path, **trainer: Any) -> Settings:
    """For the base at `base`, with a LoRA of rank 4 and one thread."""
    lora = {"rank": 4, "alpha": 8}
    return load_settings(overrides={"base": {"model": str(base)}, "trainer": {"threads": 1, "lora": lora, **trainer}})


def fresh_roles(base: Path, *, parent: Path | None = None) -> Roles:
    """The tiny base in NF4 with a policy that is a fresh LoRA, or `parent`."""
    settings = ppo_settings(base)
    model, _ = start_adapter(load_base(settings, device=torch.device("cpu")), run_config(settings, "kto"), parent)
    return Roles(model)


def taste(roles: Roles) -> Callable[[Sequence[Rollout]], torch.Tensor]:
    """The share of an answer's tokens that are liked: half of all tokens, those on one side in the embedding's first
    dimension. So a random model begins at about 0.5, and one direction of its hidden state is all there is to learn.
    """
    liked = set((roles.model.get_input_embeddings().weight[:, 0] > 0).nonzero().flatten().tolist())

    def reward(rollouts: Sequence[Rollout]) -> torch.Tensor:
        return torch.tensor([sum(token in liked for token in r.response_ids) / len(r.response_ids) for r in rollouts])

    return reward


def make_job(
    roles: Roles,
    directory: Path,
    *,
    reward: Callable[[Sequence[Rollout]], torch.Tensor] | None = None,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    job: dict[str, Any] | None = None,
    **options: Any,
) -> Job:
    chosen = PpoOptions(**{**OPTIONS, **options})
    directory.mkdir(parents=True, exist_ok=True)
    source = LocalRollouts(
        roles, stop_ids=[STOP_ID], temperature=chosen.temperature, max_tokens=chosen.max_tokens, at_once=8
    )
    return Job(
        **{
            "roles": roles,
            "prompts": prompts,
            "source": source,
            "reward": reward or taste(roles),
            "options": chosen,
            "directory": directory,
            "progress": Progress(directory, stream=io.StringIO()),
            **(job or {}),
        }
    )
