from __future__ import annotations

import numpy as np
import pytest

from scion_trainer.reward.calibration import Platt, calibration_error, cross_fitted, fit_platt, sigmoid
from scion_trainer.reward.figures import Judged


def votes(slope: float, intercept: float, *, count: int = 4000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=count)
    return scores, rng.random(count) < sigmoid(slope * scores + intercept)


def test_the_true_scaling_is_found() -> None:
    found = fit_platt(*votes(0.5, -1.0))
    assert (found.slope, found.intercept) == (pytest.approx(0.5, abs=0.1), pytest.approx(-1.0, abs=0.1))


def test_the_fit_is_a_minimum_of_the_smoothed_loss() -> None:
    scores, liked = votes(2.0, 0.3, count=200)
    found = fit_platt(scores, liked)

    def loss(slope: float, intercept: float) -> float:
        targets = np.where(liked, (liked.sum() + 1) / (liked.sum() + 2), 1 / ((~liked).sum() + 2))
        p = sigmoid(slope * scores + intercept)
        return float(-np.sum(targets * np.log(p) + (1 - targets) * np.log(1 - p)))

    best = loss(found.slope, found.intercept)
    for change in (-0.05, 0.05):
        assert loss(found.slope + change, found.intercept) > best
        assert loss(found.slope, found.intercept + change) > best


def test_separable_votes_give_a_finite_slope() -> None:
    scores = np.arange(20.0)
    found = fit_platt(scores, scores > 9.5)
    assert 0.1 < found.slope < 20


def test_one_kind_of_vote_leaves_the_scores_as_they_are() -> None:
    assert fit_platt(np.arange(5.0), np.ones(5, bool)) == Platt(1.0, 0.0)


def test_the_error_is_the_gap_of_each_bin_weighed_by_its_size() -> None:
    probabilities = np.array([0.1, 0.1, 0.1, 0.1, 0.9, 0.9])
    liked = np.array([False, False, True, True, True, True])
    # two bins of three: |0.1 - 1/3| and |(0.1 + 0.9 + 0.9) / 3 - 1|
    assert calibration_error(probabilities, liked, num_bins=2) == pytest.approx((abs(0.1 - 1 / 3) + 11 / 30) / 2)
    assert np.isnan(calibration_error(np.array([]), np.array([], bool)))


def test_overconfident_scores_are_off_until_they_are_scaled() -> None:
    scores, liked = votes(1.0, 0.0)
    wild = 5 * scores
    users = tuple(f"u{index % 50}" for index in range(len(scores)))
    assert calibration_error(sigmoid(wild), liked) > 0.15
    assert calibration_error(cross_fitted(Judged(wild, liked, scores, users), seed=0), liked) < 0.04


def test_a_user_has_no_part_in_their_own_probabilities() -> None:
    scores, liked = votes(1.0, 0.0, count=60)
    users = tuple(f"u{index % 6}" for index in range(60))
    before = cross_fitted(Judged(scores, liked, scores, users), seed=0)
    own = np.array([user == "u3" for user in users])
    after = cross_fitted(Judged(scores, np.where(own, ~liked, liked), scores, users), seed=0)
    assert np.array_equal(before[own], after[own])
    assert not np.array_equal(before, after)
