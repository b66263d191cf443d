"""`python -m tests.bench.gpu_trl JSON OUTPUT`: TRL's own SFT or KTO trainer on the task, QLoRA as its documentation has
it, with its defaults.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from tests.bench.gpu_task import Text, Tuning, texts
from tests.bench.ppo_task import LORA_TARGETS, Record, Watch, device_peak_bytes


class Laps(TrainerCallback):
    """The seconds of each step."""

    def __init__(self, record: Record) -> None:
        self._record = record
        self._watch = Watch()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._record.setup_s = self._watch.lap()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._record.seconds.append(self._watch.lap())


def main() -> None:
    task = Tuning(**json.loads(sys.argv[1])["task"])
    torch.set_num_threads(task.threads)
    record = Record()
    callback = Laps(record)
    with tempfile.TemporaryDirectory() as directory:
        model, tokenizer = load(task), AutoTokenizer.from_pretrained(task.model)
        rows = [_row(text, task.recipe) for text in texts(task, int(model.config.vocab_size))]
        training = Watch()
        trainer(task, model, tokenizer, rows, directory, callback).train()
        record.training_s = training.lap()
    record.device_peak_bytes = device_peak_bytes()
    record.write(Path(sys.argv[2]))


def load(task: Tuning) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        task.model,
        dtype=torch.bfloat16,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )


def trainer(
    task: Tuning, model: Any, tokenizer: Any, rows: list[dict[str, Any]], directory: str, callback: TrainerCallback
) -> Any:
    """What it computes beforehand it computes here, so this is a part of the training."""
    config, made = (KTOConfig, KTOTrainer) if task.recipe == "kto" else (SFTConfig, SFTTrainer)
    return made(
        model=model,
        args=config(
            output_dir=directory,
            per_device_train_batch_size=task.at_once,
            gradient_accumulation_steps=task.batch_size // task.at_once,
            num_train_epochs=1,
            learning_rate=task.learning_rate,
            max_length=task.prompt_tokens + task.answer_tokens + 8,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            seed=task.seed,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=task.rank, lora_alpha=2 * task.rank, target_modules=list(LORA_TARGETS)
        ),
        callbacks=[callback],
    )


def _row(text: Text, recipe: str) -> dict[str, Any]:
    row = {
        "prompt": [{"role": "user", "content": text.question}],
        "completion": [{"role": "assistant", "content": text.answer}],
    }
    return {**row, "label": text.liked} if recipe == "kto" else row


if __name__ == "__main__":
    main()
