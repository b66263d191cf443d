"""What decides how PPO learns. Nothing here knows where prompts, rewards or rollouts come from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

LOGITS_CHUNK_BYTES = 64 << 20
"""What the fp32 logits of the positions that are taken to the vocabulary at once may take."""


@dataclass(frozen=True, slots=True)
class PpoOptions:
    """The defaults are those of the settings, and for what is not a setting those of the papers in maths.py."""

    steps: int  # rollout-and-learn rounds
    batch_size: int  # answers sampled in each
    learning_rate: float  # of the policy, falling linearly to 0
    max_tokens: int
    temperature: float = 1.0
    passes: int = 4  # over each batch of answers
    minibatches: int = 4  # updates in each pass
    micro_batch_size: int | None = None  # answers in memory at once; None: a minibatch
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2
    dual_clip: float | None = 3.0
    value_clip: float = 0.2  # in standard deviations of the reward
    value_rate: float = 2.0  # the value role's learning rate over the policy's
    max_grad_norm: float = 1.0
    kl_coefficient: float = 0.05  # at the start, in standard deviations of the reward per nat
    kl_target: float = 6.0  # nats per answer, from the reference
    kl_horizon: int = 1_000  # answers; TRL's 10,000 would hardly move the coefficient in a run of 2,000
    missing_eos_penalty: float = 1.0  # in standard deviations of the reward
    importance_cap: float = 2.0
    outlier_limit: float = 2.0
    kl_budget: float | None = None  # nats per token from the pinned base, beyond which training stops; None: any
    reference_answers: int = 64  # for the reward's first mean and deviation
    checkpoint_every_steps: int = 20
    seed: int = 0

    @classmethod
    def of(cls, options: Mapping[str, Any], **decided: Any) -> PpoOptions:
        """From a recipe's options; `decided` has precedence. Keys that are not PPO's are left out."""
        known = {field.name for field in fields(cls)}
        return cls(**{**{key: value for key, value in options.items() if key in known}, **decided})
