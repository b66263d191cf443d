"""When memory runs out while training: half as many examples at once, on from the last checkpoint, the same steps.

Owns the retry. The examples of every optimizer step stay the same, only more of their gradients are accumulated; what
a recipe estimates within a micro-batch (KTO's KL) scatters more. It knows nothing of recipes.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from scion_adapters.errors import ScionError
from scion_trainer.checkpoints import CHECKPOINTS, newest_complete
from scion_trainer.recipes import Recipe, RunContext
from scion_trainer.recipes.batches import lower, micro_batches, step_size

_SAID_WITHOUT_A_TYPE = re.compile(
    r"DefaultCPUAllocator.*allocate memory"
    r"|CUDA error: out of memory"  # of the driver, outside torch's allocator
    r"|CUBLAS_STATUS_ALLOC_FAILED"  # its handle or workspace
    r"|Triton Error \[CUDA\]: out of memory",  # a kernel being loaded
    re.DOTALL,
)
"""What RuntimeErrors say that mean the same as torch's OutOfMemoryError. A kernel short of registers or shared memory
("out of resource") is none of them: fewer examples at once do not help it."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, the CPU allocator, CUDA or a library on it ran out of memory in this process."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    # An error of ours may quote the log of another process, such as the engine for rollouts.
    is_foreign = isinstance(error, RuntimeError) and not isinstance(error, ScionError)
    return is_foreign and _SAID_WITHOUT_A_TYPE.search(str(error)) is not None


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
