"""KTO: learns from single thumbs, up or down, and from corrections, with the parent version as the reference.

Source: Ethayarajh et al., "KTO: Model Alignment as Prospect Theoretic Optimization", 2024, arXiv 2402.01306.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from scion_adapters.errors import InvalidInputError
from scion_trainer.config import RunConfig
from scion_trainer.recipes.recipe import Example, RunContext

if TYPE_CHECKING:
    from scion_feedback.selection import SnapshotRow

WEIGHT_RATIO = 7 / 6
"""lambda_D n_D / (lambda_U n_U): the middle of the range 1 to 4/3 that eq. (8) of the paper recommends."""


class KtoRecipe:
    name = "kto"
    makes_version = True
    needs_reward_model = False

    def examples(self, rows: Iterable[SnapshotRow]) -> list[Example]:
        """Rated answers, liked or not, and what users wrote in their place, as liked."""
        found = []
        for row in rows:
            if row.liked is not None:
                found.append(Example(tuple(row.messages), row.answer, row.liked))
            if row.correction:
                found.append(Example(tuple(row.messages), row.correction, True))
        return found

    def check(self, examples: list[Example], config: RunConfig) -> None:
        liked = sum(bool(example.label) for example in examples)
        for count, missing, present in ((liked, "likes", "dislikes"), (len(examples) - liked, "dislikes", "likes")):
            if examples and count == 0:
                remedy = (
                    "wait for users to like some answers, or collect corrections and train with `--recipe sft`"
                    if missing == "likes"
                    else "train on them with `--recipe sft`, or wait for some dislikes"
                )
                raise InvalidInputError(
                    f"all {len(examples)} usable ratings are {present}; kto needs {missing} too, or it would push the "
                    f"model away from everything it says: {remedy}",
                    field="recipe",
                )
        if len(examples) < config.min_ratings:
            raise InvalidInputError(
                f"{len(examples)} usable ratings for training; trainer.min_ratings asks for {config.min_ratings}: "
                "collect more, or lower that setting",
                field="trainer.min_ratings",
            )

    def train(self, context: RunContext) -> dict[str, Any]:
        from datasets import Dataset
        from trl import KTOConfig

        from scion_trainer.lora import keep_full_precision
        from scion_trainer.recipes.fit import fit, training_arguments
        from scion_trainer.recipes.kto_trainer import LikelihoodKtoTrainer

        config = context.config
        examples = spread(context.examples, config.seed)
        num_liked = sum(bool(example.label) for example in examples)
        desirable, undesirable = balanced_weights(num_liked, len(examples) - num_liked)
        arguments = training_arguments(
            KTOConfig,
            context,
            beta=config.options["beta"],
            desirable_weight=desirable,
            undesirable_weight=undesirable,
            max_length=config.max_length,
            disable_dropout=config.dropout == 0,
            # The reference never changes, so its log-probs are taken once instead of in every epoch.
            precompute_ref_log_probs=True,
        )
        trainer = LikelihoodKtoTrainer(
            model=context.model,
            args=arguments,
            train_dataset=Dataset.from_list([example.to_row() for example in examples]),
            processing_class=context.tokenizer,
        )
        trainer.likelihood_weight = config.options.get("likelihood_weight", 0.0)  # runs begun before it was there
        # TRL made the reference as a second adapter, a copy of the parent; its log-probs are taken, so it can go.
        trainer.model.delete_adapter("ref")
        keep_full_precision(trainer.model)
        metrics = fit(trainer, context)
        return {
            **metrics,
            "beta": config.options["beta"],
            "liked": num_liked,
            "disliked": len(examples) - num_liked,
            "desirable_weight": round(desirable, 4),
            "undesirable_weight": round(undesirable, 4),
        }


def balanced_weights(num_liked: int, num_disliked: int) -> tuple[float, float]:
    """(lambda_D, lambda_U) for the data, with a mean weight of 1 over all rows.

    Eq. (8) of arXiv 2402.01306 wants 1 <= lambda_D n_D / (lambda_U n_U) <= 4/3. Unbalanced data without weights costs
    accuracy: with 25% likes the model mostly learns what not to say.
    """
    if num_liked <= 0 or num_disliked <= 0:
        raise ValueError(f"both kinds of ratings are needed, not {num_liked} likes and {num_disliked} dislikes")
    total = num_liked + num_disliked
    share = WEIGHT_RATIO / (1 + WEIGHT_RATIO)
    return share * total / num_liked, (1 - share) * total / num_disliked


def spread(examples: Iterable[Example], seed: int) -> list[Example]:
    """The examples in random order, with the likes spread evenly among the dislikes.

    KTOTrainer takes batches in the order of the data and estimates the KL within each, so an even spread gives every
    batch both kinds, and every gradient the same balance.
    """
    rng = random.Random(seed)
    placed: list[tuple[float, Example]] = []
    pool = list(examples)
    for label in (True, False):
        group = [example for example in pool if bool(example.label) is label]
        rng.shuffle(group)
        offset = rng.random()
        placed += [((index + offset) / len(group), example) for index, example in enumerate(group)]
    return [example for _, example in sorted(placed, key=lambda pair: pair[0])]
