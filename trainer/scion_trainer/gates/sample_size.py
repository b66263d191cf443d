"""How much evidence a verdict needs, and how much more an inconclusive one lacks. Pure.

Owns the formulas, with their sources. It knows no gate.
"""

from __future__ import annotations

import math
from statistics import NormalDist

SMALLEST_EDGE = 0.05
"""A win rate nearer to the wanted one than this is not worth the comparisons that would show it."""


def comparisons_needed(p1: float, p0: float = 0.5, alpha: float = 0.05, power: float = 0.8) -> int:
    """Comparisons after which a share of `p1` is told from `p0`, two-sided at level `alpha`, with probability `power`.

    n = (z(1 - alpha/2) + z(power))^2 p0 (1 - p0) / (p1 - p0)^2: the test of one proportion in its normal approximation,
    with the variance under p0 (Fleiss, Levin and Paik, "Statistical Methods for Rates and Proportions", 2003, ch. 2).
    785 for 55% against 50%. Raises ValueError when the two shares are the same or not strictly between 0 and 1 (p0).
    """
    if p1 == p0 or not 0 < p0 < 1 or not 0 <= p1 <= 1:
        raise ValueError(f"p1 = {p1:g} against p0 = {p0:g}: expected two different shares, p0 above 0 and below 1")
    normal = NormalDist()
    z = normal.inv_cdf(1 - alpha / 2) + normal.inv_cdf(power)
    return math.ceil(z**2 * p0 * (1 - p0) / (p1 - p0) ** 2)


def more_comparisons(found: float, wanted: float, num_compared: int) -> str:
    """`N more comparisons needed …`, for a share `found` among `num_compared` that cannot be told from `wanted`."""
    assumed = found if abs(found - wanted) >= SMALLEST_EDGE else min(wanted + SMALLEST_EDGE, 1.0)
    more = max(1, comparisons_needed(assumed, wanted) - num_compared)
    return f"{more} more comparisons needed to tell {assumed:.0%} from {wanted:.0%}"


def more_units(estimate: float, wanted: float, low: float, high: float, num_units: int) -> int | None:
    """Further units (users, answers) after which an interval (low, high) around `estimate` would exclude `wanted`.

    An interval shrinks with the square root of the number of units. None when the interval is open or there is no
    difference to find.
    """
    edge = abs(estimate - wanted)
    half = (high - low) / 2
    if not math.isfinite(half) or edge == 0 or math.isnan(edge):
        return None
    return max(1, math.ceil(num_units * (half / edge) ** 2) - num_units)


def wilson_interval(share: float, num: int, alpha: float = 0.05) -> tuple[float, float]:
    """Interval of a share among `num` (Wilson, JASA 22, 1927); (0, 1) for none."""
    if num == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(1 - alpha / 2)
    centre = (share + z**2 / (2 * num)) / (1 + z**2 / num)
    half = z / (1 + z**2 / num) * math.sqrt(share * (1 - share) / num + z**2 / (4 * num**2))
    return centre - half, centre + half
