"""PPO's formulas against loops that follow the papers word by word, and their gradients against differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scion_trainer.ppo import maths


def case(seed: int, rows: int = 4, width: int = 6) -> tuple[torch.Generator, Tensor]:
    """A generator, and a mask of answers of 1 to `width` tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator)
    return generator, torch.arange(width)[None, :] < lengths[:, None]


def draw(generator: torch.Generator, mask_BR: Tensor, *, garbage: bool = True) -> Tensor:
    """Random numbers at tokens, and NaN where nothing may be read."""
    values = torch.randn(mask_BR.shape, generator=generator, dtype=torch.float64)
    return values.masked_fill(~mask_BR, float("nan") if garbage else 0.0)


seeds = st.integers(0, 10_000)
few = settings(max_examples=25, deadline=None)


@few
@given(seeds, st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_discounted_sum_of_td_errors(seed: int, gamma: float, lam: float) -> None:
    generator, mask = case(seed)
    rewards, values = draw(generator, mask), draw(generator, mask)
    advantages, returns = maths.gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row in range(len(mask)):
        length = int(mask[row].sum())
        value = [float(values[row, t]) for t in range(length)] + [0.0]
        deltas = [float(rewards[row, t]) + gamma * value[t + 1] - value[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** k * deltas[t + k] for k in range(length - t))  # eq. (16)
            assert float(advantages[row, t]) == pytest.approx(expected, abs=1e-9)
            assert float(returns[row, t]) == pytest.approx(expected + value[t], abs=1e-9)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


@few
@given(seeds)
def test_with_lambda_one_the_return_is_what_came(seed: int) -> None:
    generator, mask = case(seed)
    rewards = draw(generator, mask)
    _, returns = maths.gae(rewards, draw(generator, mask), mask, gamma=1.0, lam=1.0)
    assert returns[:, 0] == pytest.approx(rewards.masked_fill(~mask, 0.0).sum(dim=1))


@few
@given(seeds)
def test_whitening_sees_tokens_only(seed: int) -> None:
    generator, mask = case(seed)
    values = draw(generator, mask) * 7 + 3
    white = maths.whiten(values, mask)
    if int(mask.sum()) > 1:
        assert float(white[mask].mean()) == pytest.approx(0, abs=1e-6)
        assert float(white[mask].std(correction=0)) == pytest.approx(1, abs=1e-4)
    assert not white[~mask].any()


def test_an_answers_score_comes_with_its_last_token_and_the_kl_with_every_one() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    kl = torch.tensor([[0.1, 0.2, float("nan")], [0.0, -0.1, 0.3]])
    rewards = maths.token_rewards(torch.tensor([1.0, -2.0]), kl, mask, 0.5)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 0.9, 0.0], [0.0, 0.05, -2.15]]))


def test_k1_averages_to_the_kl() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5])
    sampled = torch.multinomial(p, 100_000, replacement=True, generator=torch.Generator().manual_seed(0))
    estimate = maths.k1_kl(p.log()[sampled], q.log()[sampled]).mean()
    assert float(estimate) == pytest.approx(float((p * (p / q).log()).sum()), abs=0.01)


def objective(ratio: float, advantage: float, clip: float, dual: float | None) -> float:
    """One token, case by case as in the papers."""
    clipped = min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)
    return max(clipped, dual * advantage) if dual is not None and advantage < 0 else clipped


@few
@given(seeds, st.sampled_from([None, 1.5, 3.0]), st.booleans())
def test_the_policy_loss_is_the_papers_token_by_token(seed: int, dual: float | None, weighted: bool) -> None:
    generator, mask = case(seed)
    new, old, advantages = (draw(generator, mask) for _ in range(3))
    weights = draw(generator, mask).abs() if weighted else None
    found = maths.policy_loss(new, old, advantages, mask, num_tokens=50, clip=0.2, dual_clip=dual, weights_BR=weights)
    total, clipped = 0.0, 0
    for b, r in mask.nonzero().tolist():
        ratio, advantage = math.exp(float(new[b, r] - old[b, r])), float(advantages[b, r])
        value = objective(ratio, advantage, 0.2, dual)
        clipped += value != pytest.approx(ratio * advantage, abs=1e-12)
        total += value * (float(weights[b, r]) if weights is not None else 1.0)
    assert float(found.loss) == pytest.approx(-total / 50, abs=1e-9)
    assert int(found.num_clipped) == clipped


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "moves"),
    [
        (0.0, 1.0, True),  # at the start
        (0.5, 1.0, False),  # good and already far more likely: clipped
        (-0.5, 1.0, True),  # good and less likely: pull back
        (-0.5, -1.0, False),  # bad and already far less likely: clipped
        (0.5, -1.0, True),  # bad and more likely: push away
        (1.5, -1.0, False),  # bad and 4.5 times more likely: the dual clip at 3
    ],
)
def test_where_the_clip_stops_the_gradient(log_ratio: float, advantage: float, moves: bool) -> None:
    new = torch.tensor([[log_ratio]], requires_grad=True)
    mask = torch.tensor([[True]])
    zero = torch.zeros(1, 1)
    maths.policy_loss(
        new, zero, torch.tensor([[advantage]]), mask, num_tokens=1, clip=0.2, dual_clip=3.0
    ).loss.backward()
    assert new.grad is not None
    assert bool(new.grad.any()) is moves


def test_gradients_of_the_losses_agree_with_differences() -> None:
    generator, mask = case(3)
    old, advantages, returns = (draw(generator, mask, garbage=False) for _ in range(3))
    new = (old + 0.1 * draw(generator, mask, garbage=False)).requires_grad_()
    weights = draw(generator, mask, garbage=False).abs()
    assert torch.autograd.gradcheck(
        lambda x: (
            maths.policy_loss(x, old, advantages, mask, num_tokens=9, clip=0.2, dual_clip=3.0, weights_BR=weights).loss
        ),
        new,
    )
    assert torch.autograd.gradcheck(lambda x: maths.value_loss(x, old, returns, mask, num_tokens=9, clip=0.2), new)


def test_the_first_gradient_is_that_of_the_policy_gradient_theorem() -> None:
    """At ratio 1: -advantage / tokens, whatever the clips are."""
    generator, mask = case(1)
    old, advantages = draw(generator, mask, garbage=False), draw(generator, mask, garbage=False)
    new = old.clone().requires_grad_()
    maths.policy_loss(new, old, advantages, mask, num_tokens=7, clip=0.2, dual_clip=3.0).loss.backward()
    torch.testing.assert_close(new.grad, -advantages / 7)


@few
@given(seeds, st.integers(1, 3))
def test_cutting_a_minibatch_changes_no_loss(seed: int, cut: int) -> None:
    generator, mask = case(seed)
    new, old, advantages = (draw(generator, mask) for _ in range(3))
    count = int(mask.sum())

    def policy(rows: slice) -> float:
        parts = (x[rows] for x in (new, old, advantages, mask))
        return float(maths.policy_loss(*parts, num_tokens=count, clip=0.2, dual_clip=None).loss)

    def value(rows: slice) -> float:
        parts = (x[rows] for x in (new, old, advantages, mask))
        return float(maths.value_loss(*parts, num_tokens=count, clip=0.2))

    for loss in (policy, value):
        assert loss(slice(0, cut)) + loss(slice(cut, None)) == pytest.approx(loss(slice(None)))


@few
@given(seeds)
def test_the_value_loss_takes_the_worse_of_plain_and_clipped(seed: int) -> None:
    generator, mask = case(seed)
    values, old, returns = (draw(generator, mask) for _ in range(3))
    total = 0.0
    for b, r in mask.nonzero().tolist():
        v, o, target = float(values[b, r]), float(old[b, r]), float(returns[b, r])
        near = min(max(v, o - 0.2), o + 0.2)
        total += 0.5 * max((v - target) ** 2, (near - target) ** 2)
    assert float(maths.value_loss(values, old, returns, mask, num_tokens=11, clip=0.2)) == pytest.approx(total / 11)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 1.0),  # on target: stays
        (6.6, 1.0 + 0.1 * 0.64),  # 10% over: rises by 10% of 64 / 100
        (100.0, 1.0 + 0.2 * 0.64),  # far over: the error is clipped
        (0.0, 1.0 - 0.2 * 0.64),  # far under
    ],
)
def test_the_kl_controller_follows_its_target(kl: float, expected: float) -> None:
    found = maths.next_kl_coefficient(1.0, kl, target=6.0, num_answers=64, horizon=100)
    assert found == pytest.approx(expected)


def test_truncated_weights_give_the_same_mean_under_either_policy() -> None:
    """E_behaviour[w f] = E_proximal[f] where the cap does not bind; where it does, the weight is the cap."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.4, 0.2])  # proximal, behaviour
    mask = torch.ones(1, 3, dtype=torch.bool)
    weights = maths.truncated_weights(p.log()[None], q.log()[None], mask, cap=2.0)[0]
    f = torch.tensor([1.0, -2.0, 5.0])
    assert float((q * weights * f).sum()) == pytest.approx(float((p * f).sum()))
    assert maths.truncated_weights(p.log()[None], q.log()[None], mask, cap=1.1)[0].tolist() == pytest.approx(
        [1.1, 0.75, 1.0]
    )
    assert not maths.truncated_weights(p.log()[None], q.log()[None], ~mask, cap=2.0).any()


@pytest.mark.parametrize(
    ("log_ratios", "rejected"),
    [
        ([0.1, -0.1, 0.2], False),  # rounding
        ([0.8, 0.8, 0.8], True),  # every token 2.2 times as likely
        ([-0.8, -0.8, -0.8], True),  # or as unlikely
        ([1.5, -0.1, -0.1], False),  # one odd token among others
        ([float("nan"), 0.0, 0.0], True),  # no numbers
        ([float("-inf"), 0.0, 0.0], True),  # impossible under the proximal policy
    ],
)
def test_outlier_sequences(log_ratios: list[float], rejected: bool) -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    zero = torch.zeros(1, 3)
    assert maths.outliers(torch.tensor([log_ratios]), zero, mask, limit=2.0).tolist() == [rejected]
    assert maths.outliers(torch.tensor([log_ratios]), zero, ~mask, limit=2.0).tolist() == [False]  # padding


def test_mismatch_figures() -> None:
    mask = torch.tensor([[True, True, False]])
    behaviour = torch.tensor([[-1.0, -2.0, float("nan")]])
    same = maths.mismatch(behaviour, behaviour, mask)
    assert same == pytest.approx((0.0, 0.0, 0.0, 1.0))
    apart = maths.mismatch(behaviour + torch.tensor([[0.2, -0.4, 0.0]]), behaviour, mask)
    ratios = [math.exp(0.2), math.exp(-0.4)]
    k3 = sum(r - 1 - math.log(r) for r in ratios) / 2
    share = sum(ratios) ** 2 / sum(r * r for r in ratios) / 2
    assert apart == pytest.approx((0.3, 0.4, k3, share), rel=1e-5)
    assert maths.mismatch(behaviour, behaviour, mask & False) == (0.0, 0.0, 0.0, 1.0)


@few
@given(st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=5), min_size=1, max_size=4))
def test_moments_in_parts_are_those_of_all_scores(parts: list[list[float]]) -> None:
    moments = maths.Moments()
    for part in parts:
        moments = moments.with_scores(torch.tensor(part, dtype=torch.float64))
    everything = torch.tensor([score for part in parts for score in part], dtype=torch.float64)
    assert (moments.count, moments.mean) == pytest.approx((len(everything), float(everything.mean())), abs=1e-9)
    deviation = float(everything.std(correction=0))
    if deviation > 1e-3:
        assert moments.deviation == pytest.approx(deviation, rel=1e-6)
        assert float(moments.normalise(everything).mean()) == pytest.approx(0, abs=1e-6)
        assert float(moments.normalise(everything).std(correction=0)) == pytest.approx(1, abs=1e-6)


def test_equal_scores_are_not_blown_up() -> None:
    moments = maths.Moments().with_scores(torch.full((8,), 0.3))
    assert moments.deviation == 1.0
    assert float(moments.normalise(torch.tensor([0.3]))[0]) == pytest.approx(0, abs=1e-6)
