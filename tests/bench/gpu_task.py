"""The task that both sides of the GPU benchmark get for SFT and KTO: random words to learn, in batches of one length.

Imported by each side in a process of its own; what PPO does stands in ppo_task.py.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

WARM_UP_STEPS = 2


@dataclass(frozen=True, slots=True)
class Tuning:
    """One training by one recipe: `num_steps` steps of `batch_size` examples, `at_once` of them in memory."""

    model: str  # directory
    recipe: str  # sft or kto
    batch_size: int
    at_once: int
    num_steps: int
    prompt_tokens: int
    answer_tokens: int
    learning_rate: float = 1e-4
    rank: int = 16
    threads: int = 4
    seed: int = 0

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * (self.prompt_tokens + self.answer_tokens)


@dataclass(frozen=True, slots=True)
class Text:
    """A question, an answer and whether somebody liked it: of words that are one token each."""

    question: str
    answer: str
    liked: bool


def texts(task: Tuning, vocab: int) -> list[Text]:
    """As many as the task's steps take; every other one is liked."""
    rng = random.Random(task.seed)
    count = task.batch_size * task.num_steps
    return [
        Text(_words(rng, task.prompt_tokens, vocab), _words(rng, task.answer_tokens, vocab), index % 2 == 0)
        for index in range(count)
    ]


def steady(seconds: Sequence[float]) -> list[float]:
    """Without the steps that warm up, where there are others."""
    return list(seconds[WARM_UP_STEPS:] or seconds)


def _words(rng: random.Random, count: int, vocab: int) -> str:
    return " ".join(f"w{rng.randrange(2, vocab)}" for _ in range(count))
