"""Statistics for A/B blocks, in pure functions: pooled percentiles, paired ratios, bootstrap intervals over blocks.

Blocks, not requests, are resampled: requests of one block share the machine's weather, so they are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its 95% bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} ({self.low:+.3f} … {self.high:+.3f})"


def percentile(blocks: Sequence[Sequence[float]], q: float) -> float:
    """The q-th percentile (0..100) of all blocks together."""
    return float(np.percentile(np.concatenate([np.asarray(block) for block in blocks]), q))


def added(
    stock: Sequence[Sequence[float]], ours: Sequence[Sequence[float]], q: float, *, resamples: int = 400, seed: int = 0
) -> Interval:
    """How much higher the pooled q-th percentile of `ours` is; `stock[i]` and `ours[i]` were measured side by side."""
    value = percentile(ours, q) - percentile(stock, q)
    rng = np.random.default_rng(seed)
    differences = []
    for _ in range(resamples):
        chosen = rng.integers(0, len(stock), len(stock))
        differences.append(percentile([ours[i] for i in chosen], q) - percentile([stock[i] for i in chosen], q))
    low, high = np.percentile(differences, [2.5, 97.5])
    return Interval(value, float(low), float(high))


def paired(
    stock: Sequence[Sequence[float]], ours: Sequence[Sequence[float]], q: float, *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """How much higher a block's own q-th percentile is, median over the pairs: a spoiled block is outvoted."""
    differences = np.asarray([np.percentile(b, q) - np.percentile(a, q) for a, b in zip(stock, ours, strict=True)])
    rng = np.random.default_rng(seed)
    medians = np.median(rng.choice(differences, (resamples, len(differences))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return Interval(float(np.median(differences)), float(low), float(high))


def median_ratio(stock: Sequence[float], ours: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> Interval:
    """The median of ours[i] / stock[i], where pair i was measured side by side."""
    ratios = np.asarray(ours, dtype=float) / np.asarray(stock, dtype=float)
    rng = np.random.default_rng(seed)
    medians = np.median(rng.choice(ratios, (resamples, len(ratios))), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return Interval(float(np.median(ratios)), float(low), float(high))
