"""What a reward model minimises, as pure functions of its scores. A score is a log-odds: sigmoid(score) is P(liked).

Shapes: P pairs, N single thumbs, R raters. Nothing here knows of models, tokens or batches.
"""

from __future__ import annotations

import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid


def pair_losses(chosen_P: torch.Tensor, rejected_P: torch.Tensor) -> torch.Tensor:
    """-log P(chosen is preferred), in nats per pair, where P = sigmoid(chosen - rejected).

    Bradley and Terry, "Rank analysis of incomplete block designs", 1952; as a loss of a language model: Ouyang et al.,
    2022, arXiv 2203.02155, eq. (1).
    """
    return -logsigmoid(chosen_P - rejected_P)


def thumb_losses(scores_N: torch.Tensor, liked_N: torch.Tensor, biases_N: torch.Tensor) -> torch.Tensor:
    """-log P(the vote), in nats per thumb, where P(liked) = sigmoid(score + bias of the rater).

    The bias is how much more readily this rater likes anything. It is a random intercept, as in the Rasch model and
    its descendants (De Boeck and Wilson, "Explanatory Item Response Models", 2004, chapter 2): what one rater is like
    is not taken for a property of the answers, and it plays no part when answers are scored.
    """
    return binary_cross_entropy_with_logits(scores_N + biases_N, liked_N.to(scores_N.dtype), reduction="none")


def bias_penalty(biases_R: torch.Tensor, prior_std: float) -> torch.Tensor:
    """-log of the prior of all biases, each N(0, prior_std^2), in nats, up to a constant.

    It shrinks the bias of a rater with few votes towards zero. It also makes score and biases identifiable: a constant
    could otherwise move from all biases into all scores.
    """
    return biases_R.square().sum() / (2 * prior_std**2)


def batch_loss(
    *,
    chosen_P: torch.Tensor,
    rejected_P: torch.Tensor,
    scores_N: torch.Tensor,
    liked_N: torch.Tensor,
    raters_N: torch.Tensor,
    biases_R: torch.Tensor,
    prior_std: float,
    num_examples: int,
) -> torch.Tensor:
    """The mean loss of a batch of pairs and thumbs, with the prior's share in it. Scalar.

    `raters_N` are indices into `biases_R`. `num_examples` is the size of the whole training set: summed over a pass,
    the gradient is that of the negative log posterior.
    """
    losses = torch.cat([pair_losses(chosen_P, rejected_P), thumb_losses(scores_N, liked_N, biases_R[raters_N])])
    return losses.mean() + bias_penalty(biases_R, prior_std) / num_examples
