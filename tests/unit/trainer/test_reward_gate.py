"""The reward model's gate, given / when / then: what held-out users said, and what it decides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from scion_trainer.gates.types import Bound, GateResult, Verdict
from scion_trainer.reward import figures
from scion_trainer.reward.figures import Interval, Judged
from scion_trainer.reward.gate import RewardBounds, decide, judge, mirrored, pair_accuracy

BOUNDS = RewardBounds(min_auroc=0.6, max_calibration_error=0.15, max_length_correlation=0.6)
NONE = Judged.of([], [], [], [])


@pytest.fixture(autouse=True)
def fewer_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verdicts here are clear enough for that."""
    monkeypatch.setattr(figures, "NUM_RESAMPLES", 200)


def thumbs(*, skill: float, count: int = 200, users: int = 20, length_weight: float = 0.0, seed: int = 0) -> Judged:
    """Votes of users, and scores with `skill` standard deviations between liked and disliked answers."""
    rng = np.random.default_rng(seed)
    liked = rng.random(count) < 0.4
    lengths = rng.integers(3, 60, count).astype(float)
    scores = skill * liked + rng.normal(size=count) * (1 - length_weight) + length_weight * lengths / 10
    return Judged(scores, liked, lengths, tuple(f"u{index % users}" for index in range(count)))


def gate(found: Judged, pairs: Judged = NONE, **changes: Any) -> GateResult:
    bounds = {"min_auroc": 0.6, "max_calibration_error": 0.15, "max_length_correlation": 0.6, **changes}
    return decide(found, pairs, bounds=RewardBounds(**bounds), seed=0)[0]


@pytest.mark.parametrize(
    ("given", "verdict", "said"),
    [
        (thumbs(skill=2.0), Verdict.PASS, "auroc"),  # tells well, on 20 users
        (thumbs(skill=0.0, count=1000, users=100), Verdict.FAIL, "auroc"),  # surely no better than chance
        (thumbs(skill=0.4), Verdict.INCONCLUSIVE, "auroc"),  # better than chance perhaps
        (thumbs(skill=2.0, users=3), Verdict.INCONCLUSIVE, "too few"),  # three users say nothing of a fourth
        (thumbs(skill=2.0, count=12), Verdict.INCONCLUSIVE, "too few"),  # a dozen votes
        (thumbs(skill=2.0, length_weight=0.9), Verdict.FAIL, "length_correlation_given_vote"),  # counts words
        (NONE, Verdict.UNMEASURABLE, "collect ratings"),  # nobody
        (Judged.of([1.0, 2.0], [True, True], [3, 4], ["a", "b"]), Verdict.UNMEASURABLE, "collect"),  # one kind
    ],
)
def test_verdicts(given: Judged, verdict: Verdict, said: str) -> None:
    result = gate(given)
    assert result.verdict is verdict, result.reason
    assert said in result.reason


def test_votes_that_depend_on_the_user_more_than_on_the_score_break_calibration() -> None:
    """Half of the users like everything the model scores low."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=400)
    users = tuple(f"u{index % 40}" for index in range(400))
    liked = scores**2 > 0.8  # neither slope nor intercept makes odds of that
    result = gate(Judged(scores, liked, rng.random(400), users), min_auroc=0.5)
    assert result.figures["calibration_error"] > 0.15
    assert "calibration_error" in result.reason


def threshold(*, longer_is_liked: bool) -> Judged:
    """Votes and scores that jump at a length, and say nothing of length on either side."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 60, 200).astype(float)
    liked = (lengths > 30) == longer_is_liked
    return Judged(10.0 * liked + rng.normal(size=200), liked, lengths, tuple(f"u{index % 20}" for index in range(200)))


def test_a_threshold_of_length_fails_and_a_taste_for_short_answers_does_not() -> None:
    long = gate(threshold(longer_is_liked=True))
    assert (long.verdict, "length_correlation " in long.reason) == (Verdict.FAIL, True)
    assert abs(long.figures["length_correlation_given_vote"]) < 0.2
    assert gate(threshold(longer_is_liked=False)).verdict is Verdict.PASS


def test_figures_are_told_with_intervals_and_bounds() -> None:
    result = gate(thumbs(skill=2.0))
    told = result.figures
    assert told["auroc_low"] < told["auroc"] < told["auroc_high"]
    assert told["users"] == 20
    assert told["liked"] + told["disliked"] == 200
    assert {bound.figure for bound in result.bounds} == {
        "auroc",
        "calibration_error",
        "length_correlation",
        "length_correlation_given_vote",
    }


def pairs(accuracy: float, count: int = 200, users: int = 20) -> Judged:
    """`accuracy` of the pairs are in the right order."""
    rng = np.random.default_rng(0)
    margins = np.where(np.arange(count) < accuracy * count, 1.0, -1.0) * rng.uniform(0.1, 2, count)
    rng.shuffle(margins)
    lengths = [int(each) for each in rng.integers(-20, 20, count)]
    return mirrored(list(margins), [0.0] * count, lengths, [f"u{index % users}" for index in range(count)])


def test_without_thumbs_pairs_decide() -> None:
    good = gate(NONE, pairs(0.8))
    assert (good.verdict, good.figures["pair_accuracy"], good.figures["pairs"]) == (Verdict.PASS, 0.8, 200)
    assert gate(NONE, pairs(0.4)).verdict is Verdict.FAIL


def test_where_thumbs_decide_the_pairs_are_told() -> None:
    result = gate(thumbs(skill=2.0), pairs(0.3, count=20))
    assert result.verdict is Verdict.PASS
    assert result.figures["pair_accuracy"] == 0.3


def test_the_calibration_is_that_of_all_held_out_votes() -> None:
    result, platt = decide(thumbs(skill=2.0), NONE, bounds=BOUNDS, seed=0)
    assert result.verdict is Verdict.PASS
    assert platt.slope > 0.5
    assert platt.probabilities(np.array([3.0]))[0] > 0.7


def test_mirrored_pairs_are_even() -> None:
    found = mirrored([1.0, 2.0], [0.0, 3.0], [4, -2], ["a", "b"])
    assert found.scores.tolist() == [1.0, -1.0, -1.0, 1.0]
    assert found.lengths.tolist() == [4, -2, -4, 2]
    assert pair_accuracy(found) == 0.5


@pytest.mark.parametrize(
    ("interval", "whole", "verdict"),
    [
        (Interval(0.8, 0.7, 0.9), True, Verdict.PASS),  # all of it above
        (Interval(0.7, 0.5, 0.9), True, Verdict.INCONCLUSIVE),  # the figure is above, the interval is not
        (Interval(0.7, 0.5, 0.9), False, Verdict.PASS),  # for what may only not be bad
        (Interval(0.5, 0.4, 0.7), False, Verdict.INCONCLUSIVE),  # below, but it may be above
        (Interval(0.5, 0.4, 0.55), False, Verdict.FAIL),  # surely below
        (Interval(float("nan"), float("-inf"), float("inf")), False, Verdict.INCONCLUSIVE),  # nothing known
    ],
)
def test_the_interval_decides_between_fail_and_inconclusive(interval: Interval, whole: bool, verdict: Verdict) -> None:
    assert judge(interval, Bound("x", low=0.6), by_whole_interval=whole) is verdict
