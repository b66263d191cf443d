"""Reward: an ensemble that scores answers as users would, from single thumbs and pairs; what PPO climbs.

Its product is a reward model in the run's directory, not a version: nothing of it is ever served.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from scion_adapters.errors import InvalidInputError
from scion_trainer.config import RunConfig
from scion_trainer.recipes.pairs import find_pairs, rater
from scion_trainer.recipes.recipe import Example, RunContext

if TYPE_CHECKING:
    from scion_feedback.selection import SnapshotRow


class RewardRecipe:
    name = "reward"
    makes_version = False
    needs_reward_model = False

    def examples(self, rows: Iterable[SnapshotRow]) -> list[Example]:
        """Every thumb, and every pair: corrections over what they replace, liked over disliked answers to a prompt."""
        rows = list(rows)
        thumbs = [
            Example(tuple(row.messages), row.answer, row.liked, raters=(rater(row),))
            for row in rows
            if row.liked is not None
        ]
        return [*thumbs, *find_pairs(rows)]

    def check(self, examples: list[Example], config: RunConfig) -> None:
        liked = sum(example.label is True for example in examples)
        disliked = sum(example.label is False for example in examples)
        num_pairs = sum(example.rejected is not None for example in examples)
        if not num_pairs and not (liked and disliked):
            raise InvalidInputError(
                f"{liked} likes, {disliked} dislikes and no pairs for training: a reward model learns from the "
                "difference; wait for users to judge some answers otherwise, or for corrections",
                field="recipe",
            )
        if len(examples) < config.min_ratings:
            raise InvalidInputError(
                f"{len(examples)} usable thumbs and pairs for training; trainer.min_ratings asks for "
                f"{config.min_ratings}: collect more, or lower that setting",
                field="trainer.min_ratings",
            )

    def train(self, context: RunContext) -> dict[str, Any]:
        from scion_trainer.chat_tokens import ChatTokens
        from scion_trainer.reward.evaluation import evaluate, held_out, out_of_bag
        from scion_trainer.reward.files import save_weights
        from scion_trainer.reward.gate import RewardBounds
        from scion_trainer.reward.items import encode
        from scion_trainer.reward.store import DIRECTORY, GATE_METRIC, write_reward_model
        from scion_trainer.reward.training import train_ensemble
        from scion_trainer.roles import Roles

        assert context.base is not None, "a reward model is bound to its base"
        tokens = ChatTokens(context.tokenizer)
        items = encode(context.examples, tokens)
        trained = train_ensemble(context, Roles(context.model), items)
        model = trained.model
        context.progress.say("scoring answers that were rated by users not trained on")
        gate, calibration = evaluate(
            model,
            [*held_out(encode(context.heldout, tokens), model.num_members), *out_of_bag(items, trained.unseen)],
            bounds=RewardBounds.of(context.config.options),
            seed=context.config.seed,
        )
        context.progress.say(f"reward gate: {gate.verdict}: {gate.reason}")
        manifest = write_reward_model(
            context.directory / DIRECTORY,
            lambda directory: save_weights(model, directory),
            base_fingerprint=context.base.fingerprint,
            base_quantization=context.base.quantization,
            rank=context.model.peft_config["default"].r,
            num_members=model.num_members,
            disagreement_penalty=model.disagreement_penalty,
            calibration=calibration,
            gate=gate.to_json(),
        )
        return {
            "steps": trained.num_steps,
            "liked": sum(item.liked is True for item in items),
            "disliked": sum(item.liked is False for item in items),
            "pairs": sum(item.is_pair for item in items),
            "raters": len(trained.biases),
            "members": model.num_members,
            "reward_model": str(context.directory / DIRECTORY),
            "reward_digest": manifest.digest,
            GATE_METRIC: {key: value for key, value in gate.to_json().items() if key != "details"},
        }
