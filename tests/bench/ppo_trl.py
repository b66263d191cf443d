"""`python -m tests.bench.ppo_trl JSON OUTPUT`: TRL's PPO on the task, as its own example has it, with a LoRA policy.

Runs in an environment of its own with trl 1.12. The policy is a LoRA, so that there is no reference model; value and
reward are models of their own, which TRL requires.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

from tests.bench.ppo_task import (
    LORA_RANK,
    LORA_TARGETS,
    PAD,
    Record,
    Watch,
    device_peak_bytes,
    prompts,
    read_arguments,
    reward_of,
)


class Judge(torch.nn.Module):
    """TRL's reward model: a whole forward of a model, whose score is then replaced by the task's reward."""

    base_model_prefix = "backbone"

    def __init__(self, model: Any, prompt_tokens: int, seen: list[float]) -> None:
        super().__init__()
        self.model, self.backbone = model.model, self._forward
        self.config = model.config
        self._prompt_tokens, self._seen = prompt_tokens, seen
        self._scores_B: torch.Tensor | None = None

    def _forward(self, *, input_ids: torch.Tensor, **arguments: Any) -> Any:
        output = self.model(input_ids=input_ids, **arguments)
        rows = [[t for t in row if t != PAD] for row in input_ids[:, self._prompt_tokens :].tolist()]
        rewards = [reward_of(row or [PAD], self.config.vocab_size) for row in rows]
        self._seen += rewards
        self._scores_B = torch.tensor(rewards)
        return output

    def score(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        assert self._scores_B is not None
        return self._scores_B[:, None, None].expand(-1, hidden_BTD.shape[1], 1).to(hidden_BTD)


class Laps(TrainerCallback):
    """The seconds of each update and its mean reward."""

    def __init__(self, record: Record, seen: list[float]) -> None:
        self._record, self._seen = record, seen
        self._watch = Watch()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._record.setup_s = self._watch.lap()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._record.seconds.append(self._watch.lap())
        self._record.rewards.append(sum(self._seen) / len(self._seen))
        self._seen.clear()


def main() -> None:
    task, output, more = read_arguments(sys.argv)
    torch.set_num_threads(task.threads)
    record = Record(note=f"dtype {more.get('dtype', 'float32')}")
    seen: list[float] = []
    callback = Laps(record, seen)
    dtype = getattr(torch, more.get("dtype", "float32"))  # float32: the default of TRL's example script
    tokenizer = AutoTokenizer.from_pretrained(task.model, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(task.model, dtype=dtype)
    value = AutoModelForSequenceClassification.from_pretrained(task.model, num_labels=1, dtype=dtype)
    reward = AutoModelForSequenceClassification.from_pretrained(task.model, num_labels=1, dtype=dtype)
    ids = prompts(task, policy.config.vocab_size, task.batch_size * task.num_updates)
    with tempfile.TemporaryDirectory() as directory:
        arguments = PPOConfig(
            output_dir=directory,
            total_episodes=task.batch_size * task.num_updates,
            per_device_train_batch_size=task.at_once,
            gradient_accumulation_steps=task.batch_size // task.at_once,
            num_mini_batches=1,
            num_ppo_epochs=task.passes,
            local_rollout_forward_batch_size=more.get("rollout_at_once", task.batch_size),
            response_length=task.response_tokens,
            temperature=1.0,
            learning_rate=task.learning_rate,
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            seed=task.seed,
        )
        trainer = PPOTrainer(
            args=arguments,
            processing_class=tokenizer,
            model=policy,
            ref_model=None,
            reward_model=Judge(reward, task.prompt_tokens, seen),
            value_model=value,
            train_dataset=Dataset.from_dict({"input_ids": ids}),
            eval_dataset=Dataset.from_dict({"input_ids": ids[: task.at_once]}),
            peft_config=LoraConfig(
                task_type="CAUSAL_LM", r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=list(LORA_TARGETS)
            ),
            callbacks=[callback],
        )
        trainer.train()
    record.device_peak_bytes = device_peak_bytes()
    record.write(output)


if __name__ == "__main__":
    main()
