"""What the recipes on TRL's trainers share: the training arguments, and one training with checkpoints and progress.

Owns the use of `transformers.Trainer`. It knows nothing of losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from scion_adapters.errors import ScionError
from scion_trainer.checkpoints import CHECKPOINTS, mark_complete
from scion_trainer.recipes.batches import micro_batches
from scion_trainer.recipes.recipe import RunContext
from scion_trainer.stopping import RunInterruptedError

WARMUP_SHARE = 0.1


def training_arguments(kind: Callable[..., Any], context: RunContext, **own: Any) -> Any:
    """Arguments of TRL's class `kind`: those that hold for every recipe, and the recipe's `own`.

    They are for one GPU, however many the process sees (see base.default_device). transformers would take all of
    them for data parallelism, which multiplies the batch, and which TRL's trainers refuse.
    """
    arguments = kind(**_shared(context), **own)
    # There is no argument for it. Reading n_gpu settles it, so that nothing sets it again; on a CPU it is 0. It has to
    # be done before a Trainer is made, whose __init__ takes the batch size from it.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _shared(context: RunContext) -> dict[str, Any]:
    config = context.config
    micro, accumulation = micro_batches(config.batch_size, config.micro_batch_size, config.recipe)
    on_cpu = context.model.device.type == "cpu"
    return {
        "output_dir": str(context.directory / CHECKPOINTS),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "num_train_epochs": config.epochs,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": WARMUP_SHARE,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
        "bf16": True,
        "use_cpu": on_cpu,
        "gradient_checkpointing": context.gradient_checkpointing,
        "save_strategy": "steps",
        "save_steps": config.checkpoint_every_steps,
        "save_total_limit": 2,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": [] if config.report_to == "none" else [config.report_to],
        "disable_tqdm": True,
        "dataloader_pin_memory": not on_cpu,
        "seed": config.seed,
        "data_seed": config.seed,
    }


def fit(trainer: Any, context: RunContext) -> dict[str, Any]:
    """Run `trainer` to its end, from `context.resume_from` if there is one. Returns steps and loss."""
    trainer.remove_callback(PrinterCallback)  # prints to stdout, which belongs to the command's result
    trainer.add_callback(_RunCallback(context))
    output = trainer.train(resume_from_checkpoint=str(context.resume_from) if context.resume_from else None)
    state = trainer.state
    if state.global_step < state.max_steps:
        raise RunInterruptedError(
            f"stopped at step {state.global_step} of {state.max_steps}; the work up to there is in a checkpoint"
        )
    return {"steps": state.global_step, "train_loss": round(float(output.training_loss), 6)}


class _RunCallback(TrainerCallback):
    """Marks checkpoints, reports progress, stops when asked to, and refuses to go on once the loss is not a number."""

    def __init__(self, context: RunContext) -> None:
        self._context = context

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._context.progress.begin(total_steps=state.max_steps, done_steps=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._context.stop_requested() and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return  # the summary at the end
        if not math.isfinite(float(logs["loss"])):
            raise ScionError(
                f"training diverged: the loss is {logs['loss']} at step {state.global_step}; "
                "nothing was published; lower the recipe's learning_rate and run again"
            )
        self._context.progress.step(state.global_step, {k: v for k, v in logs.items() if isinstance(v, int | float)})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        mark_complete(self._context.directory / CHECKPOINTS / f"checkpoint-{state.global_step}")
