"""When memory runs out while training: half as many examples at once, on from the last checkpoint, the same steps.

Owns the retry. The examples of every optimizer step stay the same, only more of their gradients are accumulated; what
a recipe estimates within a micro-batch (KTO's KL) scatters more. It knows nothing of recipes.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from scion_trainer.checkpoints import CHECKPOINTS, newest_complete
from scion_trainer.recipes import Recipe, RunContext
from scion_trainer.recipes.batches import lower, micro_batches, step_size


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, the CPU allocator or CUDA ran out of memory."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or ("DefaultCPUAllocator" in text and "allocate memory" in text)
    )


def train_within_memory(
    recipe: Recipe, context: RunContext, *, fresh_model: Callable[[Any], Any], lowered: Callable[[int], None]
) -> tuple[RunContext, dict[str, Any]]:
    """Train, with smaller micro-batches if need be; returns the context that sufficed and the recipe's metrics.

    `fresh_model` turns the model of a failed try into one at the parent, as the recipe expects it; `lowered` is told
    each new micro-batch size, so that a resumed run begins with it. Raises the out-of-memory error when no smaller
    micro-batch is left.
    """
    config = context.config
    num_lowered = 0
    while True:
        try:
            metrics = recipe.train(context)
            size, _ = micro_batches(step_size(config), config.micro_batch_size, config.recipe)
            return context, {**metrics, "micro_batch_size": size, "out_of_memory": num_lowered}
        except Exception as error:
            smaller = lower(step_size(config), config.micro_batch_size, config.recipe)
            if smaller is None or not is_out_of_memory(error):
                raise
            said = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        # Here and not above: while the error is handled, its frames keep the failed step's tensors alive.
        num_lowered += 1
        config = replace(config, micro_batch_size=smaller)
        lowered(smaller)
        found = newest_complete(context.directory / CHECKPOINTS)
        context.progress.say(
            f"memory ran out ({said}): on from step {found.step} with {smaller} examples at once, "
            f"{step_size(config)} a step as before"
        )
        model = context.model
        context = replace(context, config=config, resume_from=found.path, model=None)
        _free()
        context = replace(context, model=fresh_model(model))


def _free() -> None:
    """Give back what the failed step held."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
