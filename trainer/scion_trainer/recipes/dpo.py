"""DPO: learns from pairs, of which one answer is preferred to the other, with the parent version as the reference.

Source: Rafailov et al., "Direct Preference Optimization", 2023, arXiv 2305.18290; with the likelihood of the preferred
answer as a second term, Pang et al., "Iterative Reasoning Preference Optimization", 2024, arXiv 2404.19733, eq. (1).
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from scion_adapters.errors import InvalidInputError
from scion_trainer.config import RunConfig
from scion_trainer.recipes.pairs import find_pairs
from scion_trainer.recipes.recipe import Example, RunContext

if TYPE_CHECKING:
    from scion_feedback.selection import SnapshotRow


class DpoRecipe:
    name = "dpo"
    makes_version = True
    needs_reward_model = False

    def examples(self, rows: Iterable[SnapshotRow]) -> list[Example]:
        """Corrections over what they replace, and liked over disliked answers to the same prompt."""
        return find_pairs(rows)

    def check(self, examples: list[Example], config: RunConfig) -> None:
        if len(examples) < config.min_ratings:
            raise InvalidInputError(
                f"{len(examples)} preference pairs for training; trainer.min_ratings asks for {config.min_ratings}: "
                "collect corrections, or several answers to the same prompts, lower that setting, or use "
                "`--recipe kto`, which learns from single thumbs",
                field="trainer.min_ratings",
            )

    def train(self, context: RunContext) -> dict[str, Any]:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer

        from scion_trainer.lora import keep_full_precision
        from scion_trainer.recipes.fit import fit, training_arguments

        config = context.config
        beta = config.options["beta"]
        examples = list(context.examples)
        random.Random(config.seed).shuffle(examples)
        rows = [example.to_row() for example in examples]
        tokens = [
            len(context.tokenizer(example.completion, add_special_tokens=False)["input_ids"]) for example in examples
        ]
        weight = likelihood_weight(config.options["likelihood_weight"], beta, sum(tokens) / len(tokens))
        arguments = training_arguments(
            DPOConfig,
            context,
            beta=beta,
            loss_type=["sigmoid", "sft"] if weight else ["sigmoid"],
            loss_weights=[1.0, weight] if weight else [1.0],
            max_length=config.max_length,
            disable_dropout=config.dropout == 0,
            # The reference never changes, so its log-probs are taken once instead of in every epoch.
            precompute_ref_log_probs=True,
        )
        trainer = DPOTrainer(
            model=context.model,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=context.tokenizer,
        )
        # TRL made the reference as a second adapter, a copy of the parent; its log-probs are taken, so it can go.
        trainer.model.delete_adapter("ref")
        keep_full_precision(trainer.model)
        return {**fit(trainer, context), "pairs": len(examples), "beta": beta}


def likelihood_weight(weight: float, beta: float, mean_answer_tokens: float) -> float:
    """The setting as the weight of TRL's "sft" loss, which is a mean over tokens.

    KTO's setting of the same name multiplies beta and the sum over an answer's tokens, the units of DPO's own
    log-ratios; one number so means the same pull in both recipes.
    """
    return weight * beta * max(1.0, mean_answer_tokens)
