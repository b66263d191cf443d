"""SFT: learns to say what users wrote as corrections, and what they liked."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from scion_adapters.errors import InvalidInputError
from scion_trainer.config import RunConfig
from scion_trainer.recipes.recipe import Example, RunContext

if TYPE_CHECKING:
    from scion_feedback.selection import SnapshotRow


class SftRecipe:
    name = "sft"
    makes_version = True
    needs_reward_model = False

    def examples(self, rows: Iterable[SnapshotRow]) -> list[Example]:
        """A correction instead of the answer where there is one; else the answer, if it was liked."""
        found = []
        for row in rows:
            if row.correction:
                found.append(Example(tuple(row.messages), row.correction))
            elif row.liked:
                found.append(Example(tuple(row.messages), row.answer))
        return found

    def check(self, examples: list[Example], config: RunConfig) -> None:
        if len(examples) < config.min_ratings:
            raise InvalidInputError(
                f"{len(examples)} corrections and liked answers for training; trainer.min_ratings asks for "
                f"{config.min_ratings}: collect more, lower that setting, or use `--recipe kto`, which learns from "
                "dislikes too",
                field="trainer.min_ratings",
            )

    def train(self, context: RunContext) -> dict[str, Any]:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        from scion_trainer.lora import keep_full_precision
        from scion_trainer.recipes.fit import fit, training_arguments

        examples = list(context.examples)
        random.Random(context.config.seed).shuffle(examples)
        arguments = training_arguments(
            SFTConfig, context, max_length=context.config.max_length, completion_only_loss=True
        )
        trainer = SFTTrainer(
            model=context.model,
            args=arguments,
            train_dataset=Dataset.from_list([example.to_row() for example in examples]),
            processing_class=context.tokenizer,
        )
        keep_full_precision(trainer.model)
        return fit(trainer, context)
