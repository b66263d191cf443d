from __future__ import annotations

import numpy as np
import pytest

from scion_trainer.reward.figures import (
    Interval,
    Judged,
    accuracy,
    auroc,
    bootstrap,
    length_correlation,
    length_correlation_given_vote,
    ranks,
)

RNG = np.random.default_rng(0)


def auroc_by_loop(scores: list[float], liked: list[bool]) -> float:
    wins, pairs = 0.0, 0
    for score, like in zip(scores, liked, strict=True):
        for other, other_like in zip(scores, liked, strict=True):
            if like and not other_like:
                pairs += 1
                wins += 1.0 if score > other else 0.5 if score == other else 0.0
    return wins / pairs


@pytest.mark.parametrize("num_values", [3, 1000])  # many ties, and hardly any
def test_auroc_is_the_share_of_pairs_in_the_right_order(num_values: int) -> None:
    scores = RNG.integers(0, num_values, 80).astype(float)
    liked = RNG.random(80) < 0.3
    assert auroc(scores, liked) == pytest.approx(auroc_by_loop(list(scores), list(liked)), abs=1e-12)


def test_auroc_of_one_kind_is_not_a_number() -> None:
    assert np.isnan(auroc(np.array([1.0, 2.0]), np.array([True, True])))


def test_accuracy_counts_ties_half() -> None:
    assert accuracy(np.array([2.0, -1.0, 0.0, 3.0])) == 0.625
    assert np.isnan(accuracy(np.array([])))


def test_equal_values_share_their_rank() -> None:
    assert ranks(np.array([5.0, 1.0, 5.0, 3.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


def judged(scores: np.ndarray, liked: np.ndarray, lengths: np.ndarray, users: int = 20) -> Judged:
    return Judged(scores, liked, lengths, tuple(f"u{index % users}" for index in range(len(scores))))


def test_a_score_that_is_a_length_keeps_its_correlation_given_the_vote() -> None:
    lengths = RNG.random(200)
    longer_is_liked = judged(lengths**3, lengths > 0.5, lengths)
    assert length_correlation(longer_is_liked) == pytest.approx(1.0)
    assert length_correlation_given_vote(longer_is_liked) > 0.95


def test_what_the_votes_account_for_is_taken_out() -> None:
    """Liked answers are longer, but among the liked ones the longer do not score higher."""
    liked = np.arange(400) % 2 == 0
    lengths = np.where(liked, 30.0, 10.0) + RNG.normal(size=400)
    quality = judged(np.where(liked, 2.0, -2.0) + RNG.normal(size=400), liked, lengths)
    assert length_correlation(quality) > 0.6
    assert abs(length_correlation_given_vote(quality)) < 0.15


def test_scores_that_do_not_vary_have_no_correlation() -> None:
    same = judged(np.zeros(10), np.arange(10) % 2 == 0, np.arange(10.0))
    assert np.isnan(length_correlation(same))


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Users differ, so an interval over answers would be too narrow; over users it holds."""
    covered = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        liked = rng.random(160) < 0.5
        taste = np.repeat(rng.normal(size=20), 8)  # a user's answers are alike
        scores = np.where(liked, 1.0, 0.0) + taste + rng.normal(size=160)
        users = tuple(f"u{index // 8}" for index in range(160))
        interval = bootstrap(lambda each: float(each.scores.mean()), Judged(scores, liked, scores, users), seed=seed)
        truth = float(np.where(liked, 1.0, 0.0).mean())
        covered += interval.low <= truth <= interval.high
    assert covered >= 34


def test_one_user_gives_no_interval() -> None:
    alone = judged(np.arange(10.0), np.arange(10) % 2 == 0, np.arange(10.0), users=1)
    found = bootstrap(lambda each: float(each.scores.mean()), alone, seed=0)
    assert found == Interval(4.5, float("-inf"), float("inf"))


def test_the_interval_of_a_biased_figure_is_turned_around() -> None:
    """|mean| of noise around zero is biased upwards, and resampling repeats that: the plain interval is too high."""
    found = judged(RNG.normal(size=60), np.arange(60) % 2 == 0, np.arange(60.0))

    def figure(each: Judged) -> float:
        return abs(float(each.scores.mean()))

    plain = bootstrap(figure, found, seed=0)
    turned = bootstrap(figure, found, seed=0, is_biased=True)
    assert (turned.low, turned.high) == (2 * plain.value - plain.high, 2 * plain.value - plain.low)
    assert turned.low < 0 < plain.low
