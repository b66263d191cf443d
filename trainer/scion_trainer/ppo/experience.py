"""From rollouts to what PPO learns from: scores, the roles' log-probs and values, advantages, and figures of all that.

Owns everything that is known of a batch of answers before the first update. It changes no weights.
Shapes: B answers, R positions of answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scion_adapters.errors import ScionError
from scion_trainer.ppo import maths
from scion_trainer.ppo.batch import Batch, OutputLayer, behaviour_log_probs, collate, response_hidden, spread
from scion_trainer.ppo.options import PpoOptions
from scion_trainer.ppo.state import State
from scion_trainer.reward.model import Head
from scion_trainer.roles import BASE, POLICY, REFERENCE, VALUE, Roles
from scion_trainer.rollouts.types import Rollout

START_MISMATCH = 0.05
"""Mean |Δ log-prob| between sampler and trainer at the first step; on the same base it is 0.002 to 0.01."""

RewardFunction = Callable[[Sequence[Rollout]], Tensor]
"""Raw scores (B,) of complete answers, on any scale."""


@dataclass(frozen=True, slots=True)
class Experience:
    """A batch of answers with all that is needed to learn from it."""

    batch: Batch
    old_BR: Tensor  # log-probs of the policy before the updates: the proximal policy
    weights_BR: Tensor  # truncated importance weights of proximal over behaviour
    values_BR: Tensor
    advantages_BR: Tensor
    returns_BR: Tensor
    mask_BR: Tensor  # the batch's mask without rejected answers
    scores_B: Tensor
    kl_per_answer: float  # nats, from the reference
    kl_to_base: float  # nats per token
    figures: dict[str, float]


@dataclass(frozen=True, slots=True)
class Assessor:
    """Asks the roles and the reward about answers. `head` is the value role's."""

    roles: Roles
    output: OutputLayer
    head: Head
    reward: RewardFunction
    options: PpoOptions

    def experience(self, rollouts: Sequence[Rollout], state: State) -> Experience:
        """All about these answers of the present policy. Raises ScionError when they are another policy's."""
        options, batch = self.options, collate(rollouts, self.roles.device)
        scores_B = self.scores(rollouts)
        finished_B = torch.tensor([rollout.finished for rollout in rollouts], device=self.roles.device)
        policy_BR, entropy_BR = self._scored(POLICY, batch, self.output.log_probs_and_entropy)
        (reference_BR,) = self._scored(REFERENCE, batch, self._log_probs)
        base_BR = reference_BR
        if self.roles.parameters(REFERENCE):  # else the reference is the base
            (base_BR,) = self._scored(BASE, batch, self._log_probs)
        (values_BR,) = self._scored(VALUE, batch, lambda part: (self.values(part),))

        behaviour_BR = behaviour_log_probs(rollouts, self.roles.device)
        apart = maths.mismatch(policy_BR, behaviour_BR, batch.mask_BR)
        if state.step == 0 and not apart.mean_abs <= START_MISMATCH:
            raise ScionError(
                f"the sampler's log-probs are {apart.mean_abs:.3g} nats per token from the trainer's at the first "
                f"step, at most {START_MISMATCH} was expected: it samples from another adapter, base, quantization or "
                "temperature"
            )
        rejected_B = maths.outliers(policy_BR, behaviour_BR, batch.mask_BR, limit=options.outlier_limit)
        mask_BR = batch.mask_BR & ~rejected_B[:, None]
        kl_BR = maths.k1_kl(policy_BR, reference_BR).masked_fill(~batch.mask_BR, 0.0)
        normal_B = state.moments.normalise(scores_B) - options.missing_eos_penalty * ~finished_B
        rewards_BR = maths.token_rewards(normal_B, kl_BR, batch.mask_BR, state.kl_coefficient)
        advantages_BR, returns_BR = maths.gae(
            rewards_BR, values_BR, batch.mask_BR, gamma=options.gamma, lam=options.lam
        )
        kl_per_answer = float(kl_BR.sum(dim=1).mean())
        kl_to_base = float(maths.masked_mean(maths.k1_kl(policy_BR, base_BR), batch.mask_BR))
        return Experience(
            batch=batch,
            old_BR=policy_BR,
            weights_BR=maths.truncated_weights(policy_BR, behaviour_BR, mask_BR, cap=options.importance_cap),
            values_BR=values_BR,
            advantages_BR=maths.whiten(advantages_BR, mask_BR),
            returns_BR=returns_BR,
            mask_BR=mask_BR,
            scores_B=scores_B,
            kl_per_answer=kl_per_answer,
            kl_to_base=kl_to_base,
            figures={
                "reward": float(scores_B.mean()),
                "reward_std": float(scores_B.std(correction=0)),
                "kl": kl_per_answer,
                "kl_to_base": kl_to_base,
                "kl_coefficient": state.kl_coefficient,
                "entropy": float(maths.masked_mean(entropy_BR, batch.mask_BR)),
                "answer_tokens": float(batch.mask_BR.sum(dim=1).float().mean()),
                "finished_share": float(finished_B.float().mean()),
                "mismatch": apart.mean_abs,
                "mismatch_max": apart.max_abs,
                "mismatch_kl": apart.kl,
                "effective_share": apart.effective_share,
                "rejected_share": float(rejected_B.float().mean()),
                "explained_variance": explained_variance(values_BR[batch.mask_BR], returns_BR[batch.mask_BR]),
            },
        )

    def scores(self, rollouts: Sequence[Rollout]) -> Tensor:
        """(B,) what the reward says. Raises ScionError when that is no finite number for each answer."""
        scores_B = self.reward(rollouts).detach().float().to(self.roles.device)
        if scores_B.shape != (len(rollouts),) or not scores_B.isfinite().all():
            raise ScionError(
                f"the reward gave {tuple(scores_B.shape)} scores for {len(rollouts)} answers, or one that is not "
                "finite; nothing was published: train a new reward model"
            )
        return scores_B

    def values(self, batch: Batch) -> Tensor:
        """(B, R) what is still to come, seen from before each token of the answers. Under the value role."""
        return spread(self.head(response_hidden(self.roles, batch)), batch.mask_BR)

    def parts(self, index: Tensor, batch: Batch) -> Iterator[Tensor]:
        """`index` in parts that are in memory at once, answers of like length together."""
        size = self.options.micro_batch_size or max(1, -(-len(batch) // self.options.minibatches))
        lengths_B = batch.prompt_lengths_B[index] + batch.mask_BR[index].sum(dim=1)
        yield from index[lengths_B.argsort(stable=True)].split(size)

    def _log_probs(self, batch: Batch) -> tuple[Tensor]:
        return (self.output.log_probs(batch),)

    def _scored(self, role: str, batch: Batch, forward: Callable[[Batch], tuple[Tensor, ...]]) -> list[Tensor]:
        """The (B, R) results of `forward` under `role` for the whole batch, a part of it at a time."""
        whole: list[Tensor] = []
        with torch.no_grad(), self.roles.use(role):
            for index in self.parts(torch.arange(len(batch), device=self.roles.device), batch):
                parts = forward(batch.rows(index))
                whole = whole or [torch.zeros_like(batch.mask_BR, dtype=torch.float32) for _ in parts]
                for whole_BR, part_BR in zip(whole, parts, strict=True):
                    whole_BR[index, : part_BR.shape[1]] = part_BR.float()
        return whole


def explained_variance(values_N: Tensor, returns_N: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 when the value role knows what comes, 0 when it knows nothing."""
    variance = float(returns_N.var(correction=0))
    return 1 - float((returns_N - values_N).var(correction=0)) / variance if variance > 1e-12 else 0.0
