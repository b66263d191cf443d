"""PPO's formulas as pure functions, each with its source. Nothing here knows of models, roles or rollouts.

Shapes: B answers, R positions of the answers (padded on the right; `mask_BR` is True on tokens, EOS included),
N tokens. Log-probs are in nats, at the temperature of the rollouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


def masked_mean(values_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """The mean over the masked positions; 0 when there are none."""
    return masked_sum(values_BR, mask_BR) / mask_BR.sum().clamp(min=1)


def masked_sum(values_BR: Tensor, mask_BR: Tensor) -> Tensor:
    """The sum over the masked positions. What stands elsewhere is not read, so it may be NaN."""
    return values_BR.masked_fill(~mask_BR, 0.0).sum()


def whiten(values_BR: Tensor, mask_BR: Tensor, eps: float = 1e-8) -> Tensor:
    """Mean 0 and variance 1 over the masked positions; 0 elsewhere.

    Andrychowicz et al., "What Matters In On-Policy Reinforcement Learning?", 2020, arXiv 2006.05990, section 3.3.
    """
    centred_BR = values_BR - masked_mean(values_BR, mask_BR)
    variance = masked_mean(centred_BR.square(), mask_BR)
    return (centred_BR * torch.rsqrt(variance + eps)).masked_fill(~mask_BR, 0.0)


def k1_kl(log_probs_BR: Tensor, other_BR: Tensor) -> Tensor:
    """log p - log q at each sampled token: unbiased for KL(p || q), where the tokens were sampled from p.

    Schulman, "Approximating KL Divergence", 2020, http://joschu.net/blog/kl-approx.html.
    """
    return log_probs_BR - other_BR


def token_rewards(scores_B: Tensor, kl_BR: Tensor, mask_BR: Tensor, kl_coefficient: float) -> Tensor:
    """Rewards (B, R): at each token -coefficient * KL, and at the last token of an answer its score too.

    Ziegler et al., "Fine-Tuning Language Models from Human Preferences", 2019, arXiv 1909.08593, eq. (2), with the KL
    split over the tokens as in their code.
    """
    rewards_BR = (-kl_coefficient * kl_BR).masked_fill(~mask_BR, 0.0)
    last_B = mask_BR.sum(dim=1) - 1
    return rewards_BR.scatter_add(1, last_B[:, None], scores_B[:, None].to(rewards_BR.dtype))


def gae(rewards_BR: Tensor, values_BR: Tensor, mask_BR: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """(advantages, returns), both (B, R) and 0 outside the mask. The value after an answer's last token is 0.

    Generalized advantage estimation: Schulman et al., 2015, arXiv 1506.02438, eq. (16), summed from the end.
    """
    values_BR = values_BR.masked_fill(~mask_BR, 0.0)
    rewards_BR = rewards_BR.masked_fill(~mask_BR, 0.0)
    advantages_BR = torch.zeros_like(values_BR)
    following_B = torch.zeros_like(values_BR[:, 0])
    next_value_B = torch.zeros_like(following_B)
    for position in range(values_BR.shape[1] - 1, -1, -1):
        delta_B = rewards_BR[:, position] + gamma * next_value_B - values_BR[:, position]
        following_B = (delta_B + gamma * lam * following_B) * mask_BR[:, position]
        advantages_BR[:, position] = following_B
        next_value_B = values_BR[:, position]
    return advantages_BR, (advantages_BR + values_BR).masked_fill(~mask_BR, 0.0)


class PolicyLoss(NamedTuple):
    """A part of a minibatch's loss: `loss` is to be added up over the parts, the figures are sums over tokens."""

    loss: Tensor  # divided by the token count of the whole minibatch already
    num_clipped: Tensor
    sum_abs_log_ratio: Tensor


def policy_loss(
    log_probs_BR: Tensor,
    old_BR: Tensor,
    advantages_BR: Tensor,
    mask_BR: Tensor,
    *,
    num_tokens: int,
    clip: float,
    dual_clip: float | None,
    weights_BR: Tensor | None = None,
) -> PolicyLoss:
    """The clipped surrogate. `num_tokens` is that of the whole minibatch, of which these B answers may be a part.

    Schulman et al., "Proximal Policy Optimization Algorithms", 2017, arXiv 1707.06347, eq. (7). With `dual_clip` c the
    objective of a token with a negative advantage A is at least c * A: Ye et al., 2020, arXiv 1912.09729, eq. (5).
    `weights_BR` are the truncated importance weights of decoupled PPO: Hilton et al., 2021, arXiv 2110.00641, eq. (3);
    `old_BR` is then the proximal policy's. One count for all tokens of a minibatch, instead of a mean for each answer
    or micro-batch, keeps a token's weight free of how long its answer is and of how the batch is cut.
    """
    log_ratio_BR = (log_probs_BR - old_BR).masked_fill(~mask_BR, 0.0)
    ratio_BR = log_ratio_BR.exp()
    plain_BR = ratio_BR * advantages_BR
    clipped_BR = ratio_BR.clamp(1 - clip, 1 + clip) * advantages_BR
    objective_BR = torch.minimum(plain_BR, clipped_BR)
    if dual_clip is not None:
        bounded_BR = torch.maximum(objective_BR, dual_clip * advantages_BR)
        objective_BR = torch.where(advantages_BR < 0, bounded_BR, objective_BR)
    binds_BR = (objective_BR != plain_BR) & mask_BR
    if weights_BR is not None:
        objective_BR = objective_BR * weights_BR
    loss = -masked_sum(objective_BR, mask_BR) / max(1, num_tokens)
    return PolicyLoss(loss, binds_BR.sum(), log_ratio_BR.detach().abs().sum())


def value_loss(
    values_BR: Tensor, old_BR: Tensor, returns_BR: Tensor, mask_BR: Tensor, *, num_tokens: int, clip: float
) -> Tensor:
    """Half the squared error, of the value or of the value held within `clip` of the old one, whichever is larger.

    `num_tokens` as in `policy_loss`. From OpenAI baselines' ppo2; described in Huang et al., "The 37 Implementation
    Details of Proximal Policy Optimization", 2022 (detail 9).
    """
    near_BR = old_BR + (values_BR - old_BR).clamp(-clip, clip)
    worst_BR = torch.maximum((values_BR - returns_BR).square(), (near_BR - returns_BR).square())
    return 0.5 * masked_sum(worst_BR, mask_BR) / max(1, num_tokens)


def next_kl_coefficient(coefficient: float, kl: float, *, target: float, num_answers: int, horizon: int) -> float:
    """The coefficient after a batch of `num_answers` with a mean KL of `kl` nats per answer.

    Ziegler et al., 2019, arXiv 1909.08593, section 2.2: proportional control in log space, the error clipped to 20%.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * num_answers / horizon)


def truncated_weights(proximal_BR: Tensor, behaviour_BR: Tensor, mask_BR: Tensor, *, cap: float) -> Tensor:
    """min(p_proximal / p_behaviour, cap) at each token, 0 outside the mask, without gradient.

    Truncated importance sampling: Ionides, 2008, doi 10.1198/106186008X320456; as the behaviour weight of decoupled
    PPO: Fu et al., "AReaL", 2025, arXiv 2505.24298, section 5.2.
    """
    log_ratio_BR = (proximal_BR - behaviour_BR).detach().masked_fill(~mask_BR, 0.0)
    return log_ratio_BR.exp().clamp(max=cap).masked_fill(~mask_BR, 0.0)


def outliers(proximal_BR: Tensor, behaviour_BR: Tensor, mask_BR: Tensor, *, limit: float) -> Tensor:
    """(B,) True for an answer that the proximal policy would hardly have given as it was sampled.

    That is: the geometric mean of its tokens' ratios is outside [1 / limit, limit], or its log-probs are no numbers.
    The mean over tokens does not grow with the length, so that long answers are not rejected for being long (Zheng et
    al., "Group Sequence Policy Optimization", 2025, arXiv 2507.18071, eq. (7), use the same ratio).
    """
    log_ratio_BR = (proximal_BR - behaviour_BR).detach().masked_fill(~mask_BR, 0.0)
    mean_B = log_ratio_BR.sum(dim=1) / mask_BR.sum(dim=1).clamp(min=1)
    bound = torch.log(torch.tensor(limit, dtype=mean_B.dtype, device=mean_B.device))
    return ~(mean_B.abs() <= bound)


class Mismatch(NamedTuple):
    """How far the policy that sampled is from the one that learns, on the same tokens."""

    mean_abs: float  # mean |Δ log-prob| in nats per token
    max_abs: float
    kl: float  # KL(behaviour || proximal) in nats per token, by the k3 estimator
    effective_share: float  # of the tokens: Kish's effective sample size of the untruncated weights, over their number


def mismatch(proximal_BR: Tensor, behaviour_BR: Tensor, mask_BR: Tensor) -> Mismatch:
    """Figures of the mismatch. k3 is Schulman's low-variance estimator r - 1 - log r (see `k1_kl`); the effective
    sample size is (sum w)^2 / sum w^2: Kish, "Survey Sampling", 1965.
    """
    log_ratio_N = (proximal_BR - behaviour_BR).detach()[mask_BR].double()
    if log_ratio_N.numel() == 0:
        return Mismatch(0.0, 0.0, 0.0, 1.0)
    ratio_N = log_ratio_N.exp()
    absolute_N = log_ratio_N.abs()
    share = ratio_N.sum().square() / ratio_N.square().sum() / ratio_N.numel()
    kl = (ratio_N - 1 - log_ratio_N).mean()
    return Mismatch(float(absolute_N.mean()), float(absolute_N.max()), float(kl), float(share))


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and sum of squared deviations of the scores seen so far."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def deviation(self) -> float:
        """The standard deviation; 1 while there are fewer than two scores, or when all are equal."""
        variance = self.squares / self.count if self.count > 1 else 0.0
        return variance**0.5 if variance > 1e-12 else 1.0

    def with_scores(self, scores_B: Tensor) -> Moments:
        """With further scores: the pairwise update of Chan, Golub and LeVeque, 1979 (Stanford STAN-CS-79-773)."""
        added = int(scores_B.numel())
        if added == 0:
            return self
        scores_B = scores_B.double()
        mean = float(scores_B.mean())
        count, difference = self.count + added, mean - self.mean
        squares = self.squares + float((scores_B - mean).square().sum())
        return Moments(
            count,
            self.mean + difference * added / count,
            squares + difference**2 * self.count * added / count,
        )

    def normalise(self, scores_B: Tensor) -> Tensor:
        """Scores with mean 0 and deviation 1 by the moments so far.

        The first moments are those of the reference's answers, so that it begins at 0: Stiennon et al., 2020,
        arXiv 2009.01325, appendix B.1.
        """
        return (scores_B - self.mean) / self.deviation
