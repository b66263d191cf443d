"""PPO: the model answers its users' prompts, a reward model that passed its gate judges, and it learns from that.

Owns what the other recipes give their trainer as well: prompts, options, and the models' places. The algorithm is in
scion_trainer/ppo.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from scion_adapters.errors import InvalidInputError
from scion_feedback.lineage import REWARD_RUN_METRIC
from scion_trainer.config import RunConfig
from scion_trainer.recipes.batches import micro_batches
from scion_trainer.recipes.recipe import Example, RunContext

if TYPE_CHECKING:
    from torch import Tensor

    from scion_feedback.selection import SnapshotRow
    from scion_trainer.ppo.options import PpoOptions
    from scion_trainer.roles import Roles
    from scion_trainer.rollouts.choice import ChosenSource
    from scion_trainer.rollouts.types import Rollout, RolloutSource

MIN_PROMPTS = 8


class PpoRecipe:
    name = "ppo"
    makes_version = True
    needs_reward_model = True

    def examples(self, rows: Iterable[SnapshotRow]) -> list[Example]:
        """Every prompt that was rated, once, whatever the rating; its answer stands for how long answers are."""
        found: dict[str, Example] = {}
        for row in rows:
            key = json.dumps(row.messages, sort_keys=True)
            found.setdefault(key, Example(tuple(row.messages), row.answer, row.liked))
        return list(found.values())

    def check(self, examples: list[Example], config: RunConfig) -> None:
        if len(examples) < MIN_PROMPTS:
            raise InvalidInputError(
                f"{len(examples)} different prompts for training; ppo needs {MIN_PROMPTS}: wait until users asked "
                "more, or train with `--recipe kto`",
                field="recipe",
            )

    def train(self, context: RunContext) -> dict[str, Any]:
        from scion_trainer.chat_tokens import ChatTokens
        from scion_trainer.ppo.options import PpoOptions
        from scion_trainer.ppo.ppo import Job, train
        from scion_trainer.reward.files import load_reward_model
        from scion_trainer.reward.store import read_manifest
        from scion_trainer.roles import REFERENCE, VALUE, Roles, reward_role

        assert context.base is not None, "a reward model is bound to its base"
        assert context.reward_model is not None, "run.py pins it"
        config, tokens, directory = context.config, ChatTokens(context.tokenizer), context.reward_model
        digest = read_manifest(directory).digest
        max_tokens = int(config.options["max_tokens"])
        prompts = [tuple(tokens.prompt(example.prompt)) for example in context.examples]
        fitting = [prompt for prompt in prompts if len(prompt) + max_tokens <= config.max_length]
        if len(fitting) < MIN_PROMPTS:
            raise InvalidInputError(
                f"{len(fitting)} of {len(prompts)} prompts leave room for trainer.ppo.max_tokens = {max_tokens} tokens "
                f"of answer within trainer.max_length = {config.max_length}: lower the first or raise the second",
                field="trainer.ppo.max_tokens",
            )
        micro, _ = micro_batches(config.batch_size, config.micro_batch_size, self.name)
        options = PpoOptions.of(
            config.options,
            steps=num_steps(len(fitting), config),
            batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            micro_batch_size=min(micro, -(-config.batch_size // int(config.options["minibatches"]))),
            kl_budget=config.kl_budget,
            checkpoint_every_steps=config.checkpoint_every_steps,
            seed=config.seed,
        )
        roles = Roles(context.model)
        if context.gradient_checkpointing:
            roles.checkpoint_activations()
        model = load_reward_model(roles, directory, base_fingerprint=context.base.fingerprint)

        def reward(rollouts: Sequence[Rollout]) -> Tensor:
            sequences = [rollout.prompt_ids + rollout.response_ids for rollout in rollouts]
            return model.penalised(model.score_sequences(sequences))

        source = open_source(
            context, roles, options, stop_ids=tokens.stop_ids(), at_once=min(config.batch_size, 4 * micro)
        )
        try:
            measured = train(
                Job(
                    roles=roles,
                    prompts=fitting,
                    source=source,
                    reward=reward,
                    options=options,
                    directory=context.directory,
                    progress=context.progress,
                    resume_from=context.resume_from,
                    value_from=model.heads[0],
                    stop_requested=context.stop_requested,
                )
            )
        finally:
            source.close()
        for role in (REFERENCE, VALUE, *map(reward_role, range(model.num_members))):
            roles.remove(role)  # the model goes on as any recipe leaves it, and without their memory
        return {
            **measured,
            "prompts": len(fitting),
            "reward_model": str(directory),
            "reward_digest": digest,
            REWARD_RUN_METRIC: directory.parent.name,
        }


def open_source(
    context: RunContext, roles: Roles, options: PpoOptions, *, stop_ids: Collection[int], at_once: int
) -> ChosenSource:
    """Rollouts from where `trainer.ppo.rollouts` says, or from the next best place when that fails under `auto`."""
    from scion_trainer.rollouts.choice import ChosenSource, Place, rank, surroundings
    from scion_trainer.rollouts.engine import EngineSource
    from scion_trainer.rollouts.local import LocalRollouts
    from scion_trainer.rollouts.sampling import Sampling
    from scion_trainer.rollouts.server import ServerSource

    settings, registry, base = context.settings, context.registry, context.base
    assert settings is not None, "run.py fills these in"
    assert registry is not None
    assert base is not None
    sampling = Sampling(options.max_tokens, options.temperature, tuple(sorted(stop_ids)))
    actor = f"ppo {context.directory.name}"

    def make(place: Place) -> RolloutSource:
        if place is Place.SERVER:
            concurrency = settings.trainer.ppo.server_concurrency
            return ServerSource(settings, registry, base, sampling, actor=actor, concurrency=concurrency)
        if place is Place.ENGINE:
            home, longest = context.directory / "engine", context.config.max_length
            return EngineSource(
                settings, base, sampling, home, actor=actor, max_length=longest, say=context.progress.say
            )
        return LocalRollouts(
            roles, stop_ids=stop_ids, temperature=options.temperature, max_tokens=options.max_tokens, at_once=at_once
        )

    around = surroundings(base, serves_rollouts=settings.server.ppo_rollouts, num_answers=options.batch_size)
    return ChosenSource(rank(str(context.config.options["rollouts"]), around), make, context.progress.say)


def num_steps(num_prompts: int, config: RunConfig) -> int:
    """Rounds of rollouts: as many as sample each prompt `epochs` times."""
    assert config.epochs is not None, "defaults.resolve leaves nothing open"
    return max(1, math.ceil(config.epochs * num_prompts / config.batch_size))
