"""The reward model's own gate: on users it has not seen it tells what they like, with believable odds, not by length.

Owns the decision, a pure function of scored answers. PPO is refused a reward model that did not pass: a policy finds
whatever a reward gets wrong.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scion_trainer.gates.types import Bound, GateResult, Verdict
from scion_trainer.reward.calibration import Platt, calibration_error, cross_fitted, fit_platt
from scion_trainer.reward.figures import (
    Interval,
    Judged,
    accuracy,
    auroc,
    bootstrap,
    length_correlation,
    length_correlation_given_vote,
)

NAME = "reward"
MIN_USERS = 4
"""With fewer, resampling them says nothing."""
MIN_RATED = 10
"""Liked answers, and disliked ones, below which nothing is decided; or pairs."""


@dataclass(frozen=True, slots=True)
class RewardBounds:
    """What a reward model must hold; see RewardSection."""

    min_auroc: float
    max_calibration_error: float
    max_length_correlation: float

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> RewardBounds:
        """From a run's options."""
        return cls(options["min_auroc"], options["max_calibration_error"], options["max_length_correlation"])


@dataclass(frozen=True, slots=True)
class _Finding:
    """One bounded figure with what it says about the model."""

    bound: Bound
    interval: Interval
    verdict: Verdict

    @property
    def told(self) -> str:
        return f"{self.bound.figure} {self.interval} {self.verdict} (allowed: {self.bound.describe()})"


def decide(thumbs: Judged, pairs: Judged, *, bounds: RewardBounds, seed: int) -> tuple[GateResult, Platt]:
    """The verdict on scores of held-out answers, and the calibration for scores from now on.

    `pairs` are mirrored: see `mirrored`. Thumbs decide where both kinds are there in sufficient numbers, else pairs;
    the other kind is told. AUROC (for pairs the accuracy, which is the AUROC within a prompt) passes when its whole
    interval is at least the bound, because only positive evidence may let a policy loose on a reward; calibration
    error and length correlations pass when the figure itself is within the bound. A figure that does not pass fails
    when its whole interval is outside of the bound and is inconclusive otherwise.

    Length is bounded upwards only, the way in which policies are known to exploit rewards; a taste for short answers is
    held by the gates of the version (length, empty answers). It is bounded twice: over all answers, where a threshold
    that the votes have shows, and among answers with the same vote, where a score that goes on rising shows.
    """
    by_thumbs = _suffices(thumbs)
    judged = thumbs if by_thumbs or not len(pairs) else pairs
    platt = fit_platt(judged.scores, judged.liked)
    figures = _counts(thumbs, pairs)
    if len(thumbs):
        figures |= {"auroc": auroc(thumbs.scores, thumbs.liked)}
    if len(pairs):
        figures |= {"pair_accuracy": pair_accuracy(pairs)}
    if not len(judged) or judged.liked.all() or not judged.liked.any():
        reason = "no held-out answers of both kinds, and no held-out pairs: collect ratings of more users"
        return GateResult(NAME, Verdict.UNMEASURABLE, reason, _finite(figures)), platt
    findings = _findings(judged, by_thumbs or not len(pairs), bounds, seed)
    for each in findings:
        name = each.bound.figure
        figures |= {name: each.interval.value, f"{name}_low": each.interval.low, f"{name}_high": each.interval.high}
    verdicts = {each.verdict for each in findings}
    verdict = next((v for v in (Verdict.FAIL, Verdict.INCONCLUSIVE) if v in verdicts), Verdict.PASS)
    told = [each for each in findings if each.verdict is verdict]
    reason = "; ".join(each.told for each in told)
    if not _suffices(judged):
        verdict = Verdict.INCONCLUSIVE
        reason = (
            f"{len(judged)} held-out answers of {judged.num_users} users are too few to decide "
            f"(needed: {MIN_RATED} of each kind, {MIN_USERS} users); {reason}"
        )
    return (
        GateResult(NAME, verdict, reason, _finite(figures), tuple(each.bound for each in findings), _details(judged)),
        platt,
    )


def mirrored(
    chosen: Sequence[float], rejected: Sequence[float], lengths: Sequence[int], users: Sequence[str]
) -> Judged:
    """Pairs as judged differences, each in both directions: chosen less rejected is liked, the reverse is not.

    `lengths` are differences too. So P(preferred) and the correlation with length are those of thumbs.
    """
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    return Judged.of(
        [*margins, *(-each for each in margins)],
        [True] * len(margins) + [False] * len(margins),
        [*lengths, *(-each for each in lengths)],
        [*users, *users],
    )


def pair_accuracy(pairs: Judged) -> float:
    """The share of mirrored pairs whose preferred answer scores higher."""
    return accuracy(pairs.scores[pairs.liked])


def judge(interval: Interval, bound: Bound, *, by_whole_interval: bool) -> Verdict:
    """Pure: one figure against its bound."""
    inside = bound.holds(interval.low) and bound.holds(interval.high)
    if inside or (bound.holds(interval.value) and not by_whole_interval):
        return Verdict.PASS
    is_outside = (bound.low is not None and interval.high < bound.low) or (
        bound.high is not None and interval.low > bound.high
    )
    return Verdict.FAIL if is_outside else Verdict.INCONCLUSIVE


def _findings(judged: Judged, are_thumbs: bool, bounds: RewardBounds, seed: int) -> list[_Finding]:
    probabilities = cross_fitted(judged, seed=seed)
    calibrated = judged.with_scores(probabilities)
    discrimination = Bound("auroc" if are_thumbs else "pair_accuracy", low=bounds.min_auroc)
    telling = bootstrap(
        (lambda each: auroc(each.scores, each.liked)) if are_thumbs else pair_accuracy, judged, seed=seed
    )
    calibration = Bound("calibration_error", high=bounds.max_calibration_error)
    error = bootstrap(lambda each: calibration_error(each.scores, each.liked), calibrated, seed=seed, is_biased=True)
    found = [
        _Finding(discrimination, telling, judge(telling, discrimination, by_whole_interval=True)),
        _Finding(calibration, error, judge(error, calibration, by_whole_interval=False)),
    ]
    for correlation in (length_correlation, length_correlation_given_vote):
        bound = Bound(correlation.__name__, high=bounds.max_length_correlation)
        counting = bootstrap(correlation, judged, seed=seed)
        if math.isnan(counting.value):  # scores or lengths that do not vary cannot go together
            counting = Interval(0.0, 0.0, 0.0)
        found.append(_Finding(bound, counting, judge(counting, bound, by_whole_interval=False)))
    return found


def _suffices(judged: Judged) -> bool:
    num_liked = int(judged.liked.sum())
    return min(num_liked, len(judged) - num_liked) >= MIN_RATED and judged.num_users >= MIN_USERS


def _counts(thumbs: Judged, pairs: Judged) -> dict[str, float]:
    return {
        "liked": float(thumbs.liked.sum()),
        "disliked": float((~thumbs.liked).sum()),
        "pairs": len(pairs) / 2,
        "users": float(len({*thumbs.users, *pairs.users})),
    }


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    """Only what JSON and the database can hold."""
    return {name: round(value, 6) for name, value in figures.items() if math.isfinite(value)}


def _details(judged: Judged) -> dict[str, Any]:
    """The scores of both kinds, for a histogram."""
    return {
        "liked_scores": [round(float(each), 4) for each in judged.scores[judged.liked]],
        "disliked_scores": [round(float(each), 4) for each in judged.scores[~judged.liked]],
    }
