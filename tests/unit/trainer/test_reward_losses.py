from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from scion_trainer.reward.losses import batch_loss, bias_penalty, pair_losses, thumb_losses


def by_hand(**given: Any) -> float:
    """The batch's loss, one example after the other, in plain Python."""

    def nats(logit: float) -> float:
        return math.log(1 + math.exp(-logit))

    losses = [nats(float(a) - float(b)) for a, b in zip(given["chosen_P"], given["rejected_P"], strict=True)]
    for score, liked, rater in zip(given["scores_N"], given["liked_N"], given["raters_N"], strict=True):
        logit = float(score) + float(given["biases_R"][int(rater)])
        losses.append(nats(logit if bool(liked) else -logit))
    prior = sum(float(bias) ** 2 for bias in given["biases_R"]) / (2 * given["prior_std"] ** 2)
    return sum(losses) / len(losses) + prior / given["num_examples"]


def batch(num_pairs: int = 3, num_thumbs: int = 5, num_raters: int = 4) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def draw(size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    return {
        "chosen_P": draw(num_pairs),
        "rejected_P": draw(num_pairs),
        "scores_N": draw(num_thumbs),
        "liked_N": draw(num_thumbs) > 0,
        "raters_N": torch.arange(num_thumbs) % num_raters,
        "biases_R": draw(num_raters),
        "prior_std": 0.7,
        "num_examples": 50,
    }


@pytest.mark.parametrize(("num_pairs", "num_thumbs"), [(3, 5), (0, 5), (3, 0)])  # both kinds, and either alone
def test_the_loss_is_the_mean_over_all_examples_and_the_prior(num_pairs: int, num_thumbs: int) -> None:
    given = batch(num_pairs, num_thumbs)
    assert batch_loss(**given).item() == pytest.approx(by_hand(**given), rel=1e-12)


@pytest.mark.parametrize("name", ["chosen_P", "rejected_P", "scores_N", "biases_R"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    given = batch()
    variable = given[name].clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(batch_loss(**{**given, name: variable}), variable)
    step = 1e-6
    for index in range(len(variable)):
        moved = [given[name].clone() for _ in range(2)]
        moved[0][index] += step
        moved[1][index] -= step
        up, down = (by_hand(**{**given, name: each}) for each in moved)
        assert gradient[index].item() == pytest.approx((up - down) / (2 * step), abs=1e-7)


def test_the_losses_of_extreme_scores_are_finite() -> None:
    far = torch.tensor([1e4, -1e4])
    assert pair_losses(far, -far).tolist() == [0.0, 2e4]
    assert thumb_losses(far, torch.tensor([False, False]), torch.zeros(2)).tolist() == [1e4, 0.0]


def fitted_biases(votes: dict[int, tuple[int, int]], prior_std: float) -> list[float]:
    """Biases that minimise the loss for {rater: (likes, dislikes)} when every answer scores zero."""
    raters = [rater for rater, counts in votes.items() for _ in range(sum(counts))]
    liked = [vote for likes, dislikes in votes.values() for vote in [True] * likes + [False] * dislikes]
    biases = torch.zeros(len(votes), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([biases], max_iter=100, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        scores = torch.zeros(len(liked), dtype=torch.float64)
        loss = thumb_losses(scores, torch.tensor(liked), biases[torch.tensor(raters)]).sum()
        loss = loss + bias_penalty(biases, prior_std)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)
    return [float(bias) for bias in biases.detach()]


def test_a_harsh_rater_gets_a_negative_bias_and_few_votes_move_it_little() -> None:
    fair, harsh, quiet, kind = fitted_biases({0: (20, 20), 1: (4, 36), 2: (0, 1), 3: (36, 4)}, prior_std=1.0)
    assert fair == pytest.approx(0.0, abs=1e-6)
    assert harsh == pytest.approx(-kind, abs=1e-6)
    assert -math.log(9) < harsh < -1.5  # the log-odds of 4 in 40 would be -2.2; the prior takes some of that off
    assert -0.6 < quiet < -0.2  # one dislike would give minus infinity without the prior


def test_without_the_prior_a_bias_is_the_log_odds_of_the_votes() -> None:
    (bias,) = fitted_biases({0: (30, 10)}, prior_std=1e6)
    assert bias == pytest.approx(math.log(3), abs=1e-4)
