"""How many comparisons a verdict needs: the textbook's figures, and what is said when there are too few."""

from __future__ import annotations

import math

import pytest

from scion_trainer.gates.sample_size import comparisons_needed, more_comparisons, more_units, wilson_interval


@pytest.mark.parametrize(
    ("p1", "p0", "alpha", "power", "needed"),
    [
        (0.55, 0.5, 0.05, 0.8, 785),
        (0.45, 0.5, 0.05, 0.8, 785),  # worse is as hard to see as better
        (0.6, 0.5, 0.05, 0.8, 197),
        (0.51, 0.5, 0.05, 0.8, 19623),
        (0.55, 0.5, 0.05, 0.9, 1051),  # to be surer of finding it
        (0.55, 0.5, 0.01, 0.8, 1168),  # to be surer that it is no chance
    ],
)
def test_the_number_of_comparisons(p1: float, p0: float, alpha: float, power: float, needed: int) -> None:
    assert comparisons_needed(p1, p0, alpha, power) == needed


@pytest.mark.parametrize(("p1", "p0"), [(0.5, 0.5), (0.5, 0.0), (0.5, 1.0), (1.2, 0.5)])
def test_no_number_tells_what_is_not_different_or_no_share(p1: float, p0: float) -> None:
    with pytest.raises(ValueError, match="expected two different shares"):
        comparisons_needed(p1, p0)


@pytest.mark.parametrize(
    ("found", "wanted", "num", "says"),
    [
        (0.6, 0.5, 64, "133 more comparisons needed to tell 60% from 50%"),
        (0.5, 0.5, 64, "721 more comparisons needed to tell 55% from 50%"),  # nothing to find: the smallest edge of use
        (0.58, 0.5, 10_000, "1 more comparisons needed"),  # never zero, or it would not be inconclusive
    ],
)
def test_what_is_said(found: float, wanted: float, num: int, says: str) -> None:
    assert more_comparisons(found, wanted, num).startswith(says)


def test_an_interval_shrinks_with_the_square_root() -> None:
    # 0.1 with an interval of half width 0.2 over 10 users: four times as many halve it.
    assert more_units(0.1, 0.0, -0.1, 0.3, 10) == 30
    assert more_units(0.0, 0.0, -0.1, 0.1, 10) is None
    assert more_units(0.1, 0.0, -math.inf, math.inf, 2) is None


def test_wilson() -> None:
    # Newcombe, 1998, table I: 81 of 263.
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0.0, 0) == (0.0, 1.0)
    assert wilson_interval(1.0, 10)[0] < 0.73  # ten of ten is no certainty
