"""How a step's examples are cut into what is in memory at once."""

from __future__ import annotations

from scion_trainer.config import RunConfig

SEVERAL = ("kto",)
"""Recipes that compare the examples in memory with each other: KTO estimates the KL between them."""


def micro_batches(batch_size: int, micro_batch_size: int | None, recipe: str = SEVERAL[0]) -> tuple[int, int]:
    """(examples in memory at once, how many of these make a step); None = the whole batch.

    The first is the largest divisor of `batch_size` that is at most `micro_batch_size`; for recipes in SEVERAL it is at
    least 2 where the batch has two.
    """
    smallest = 2 if recipe in SEVERAL else 1
    limit = batch_size if micro_batch_size is None else max(smallest, micro_batch_size)
    size = max((s for s in range(smallest, min(limit, batch_size) + 1) if batch_size % s == 0), default=batch_size)
    return size, batch_size // size


def step_size(config: RunConfig) -> int:
    """Examples of one optimizer step: a batch, or for PPO a part of one."""
    return max(1, config.batch_size // int(config.options.get("minibatches", 1)))


def lower(batch_size: int, micro_batch_size: int | None, recipe: str) -> int | None:
    """The next smaller micro-batch that gives the same steps, at most half of the present one; None: there is none."""
    size, _ = micro_batches(batch_size, micro_batch_size, recipe)
    smaller, _ = micro_batches(batch_size, max(1, size // 2), recipe)
    return smaller if smaller < size else None
