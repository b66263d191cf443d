"""How well scores tell liked from disliked, and how far they merely count words: figures with intervals over users.

Pure functions of numpy arrays. One entry per judged answer: score (float), liked (bool), user, length (tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

NUM_RESAMPLES = 500
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure and its 95% interval; (-inf, inf) where the data do not give one."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True, slots=True)
class Judged:
    """Scored answers with what users said of them; all arrays have the same length."""

    scores: Floats
    liked: Bools
    lengths: Floats
    users: tuple[str, ...]

    @classmethod
    def of(cls, scores: Sequence[float], liked: Sequence[bool], lengths: Sequence[int], users: Sequence[str]) -> Judged:
        return cls(np.asarray(scores, float), np.asarray(liked, bool), np.asarray(lengths, float), tuple(users))

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def num_users(self) -> int:
        return len(set(self.users))

    def take(self, indices: NDArray[np.intp]) -> Judged:
        """Some of them, without their users, whom no figure asks for."""
        return Judged(self.scores[indices], self.liked[indices], self.lengths[indices], ())

    def with_scores(self, scores: Floats) -> Judged:
        return Judged(scores, self.liked, self.lengths, self.users)


def auroc(scores: Floats, liked: Bools) -> float:
    """P(a liked answer scores higher than a disliked one), ties counting half; NaN when there is only one kind.

    By ranks: Hanley and McNeil, "The meaning and use of the area under a ROC curve", Radiology, 1982.
    """
    num_liked = int(liked.sum())
    num_disliked = len(liked) - num_liked
    if not num_liked or not num_disliked:
        return float("nan")
    rank_sum = float(ranks(scores)[liked].sum())
    return (rank_sum - num_liked * (num_liked + 1) / 2) / (num_liked * num_disliked)


def accuracy(margins: Floats) -> float:
    """The share of pairs whose preferred answer scores higher, ties counting half. NaN without pairs."""
    return float(np.mean((margins > 0) + 0.5 * (margins == 0))) if len(margins) else float("nan")


def ranks(values: Floats) -> Floats:
    """Ranks from 1 on; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse].astype(np.float64)


def length_correlation(judged: Judged) -> float:
    """Spearman's correlation of score and length. Users may really like long answers, or short ones: see the next."""
    return _correlation(ranks(judged.scores), ranks(judged.lengths))


def length_correlation_given_vote(judged: Judged) -> float:
    """The same among answers with the same vote: the partial rank correlation of score and length given the vote.

    When liked answers are longer because of what they say, the votes account for it and little is left. When the score
    is hardly more than a length, it stays near 1 (or -1): that is what a policy would exploit (Singhal et al., "A Long
    Way to Go: Investigating Length Correlations in RLHF", 2023, arXiv 2310.03716).
    """
    scores, lengths = ranks(judged.scores), ranks(judged.lengths)
    for kind in (judged.liked, ~judged.liked):
        if kind.any():
            scores[kind] -= scores[kind].mean()
            lengths[kind] -= lengths[kind].mean()
    return _correlation(scores, lengths)


def bootstrap(figure: Callable[[Judged], float], judged: Judged, *, seed: int, is_biased: bool = False) -> Interval:
    """The figure with its interval over users: whole users are drawn with replacement (cluster bootstrap).

    Percentile interval; with `is_biased` the basic one, which takes out a bias that resampling repeats (Davison and
    Hinkley, "Bootstrap Methods and their Application", 1997, sections 5.2 and 5.3). Without an interval when fewer than
    half of the resamples have a figure.
    """
    value = figure(judged)
    unknown = Interval(value, float("-inf"), float("inf"))
    names, codes = np.unique(np.asarray(judged.users, dtype=str), return_inverse=True)
    if len(names) < 2:
        return unknown
    members = [np.flatnonzero(codes == code) for code in range(len(names))]
    generator = np.random.default_rng(seed)
    drawn = [
        figure(judged.take(np.concatenate([members[user] for user in generator.integers(0, len(names), len(names))])))
        for _ in range(NUM_RESAMPLES)
    ]
    known = np.asarray([each for each in drawn if each == each])
    if len(known) < NUM_RESAMPLES // 2:
        return unknown
    tail = (1 - CONFIDENCE) / 2
    low, high = (float(each) for each in np.quantile(known, (tail, 1 - tail)))
    return Interval(value, 2 * value - high, 2 * value - low) if is_biased else Interval(value, low, high)


def _correlation(first: Floats, second: Floats) -> float:
    """Pearson's; NaN when one of them does not vary."""
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return float("nan")
    return float(np.corrcoef(first, second)[0, 1])
