"""Is the candidate worse than another model on the same questions, beyond what chance explains? Pure.

Owns the exact paired test and the rule that gates with yes-or-no questions share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

from scion_trainer.gates.types import Verdict


@dataclass(frozen=True, slots=True)
class Paired:
    """How two models did on the same questions, of `asked` answers each. `increase` is the share by which the candidate
    fails more.
    """

    asked: int
    candidate_failed: int
    other_failed: int
    newly_failed: int  # the candidate fails where the other does not, or more often
    no_longer_failed: int
    p_value: float

    @property
    def increase(self) -> float:
        return (self.candidate_failed - self.other_failed) / self.asked


def compare(candidate_failed: Sequence[int], other_failed: Sequence[int], *, times: int = 1) -> Paired:
    """At least one question, the same ones in the same order, each asked `times` times; how often each was failed.

    Questions, not answers, are the units of the p-value: answers to one question are alike.
    """
    differences = [ours - theirs for ours, theirs in zip(candidate_failed, other_failed, strict=True)]
    return Paired(
        asked=times * len(differences),
        candidate_failed=sum(candidate_failed),
        other_failed=sum(other_failed),
        newly_failed=sum(d for d in differences if d > 0),
        no_longer_failed=-sum(d for d in differences if d < 0),
        p_value=flipped_p_value(differences),
    )


def flipped_p_value(differences: Sequence[int]) -> float:
    """P(the sum is at least what it is) if every difference had either sign with the same chance, exactly.

    Fisher's randomization test for pairs (Fisher, "The Design of Experiments", 1935, section 21), one-sided; with
    differences of one it is `exact_p_value`.
    """
    ways = {0: 1}  # of getting each sum, in signs
    for d in filter(None, differences):
        flipped: dict[int, int] = {}
        for total, count in ways.items():
            for signed in (total + d, total - d):
                flipped[signed] = flipped.get(signed, 0) + count
        ways = flipped
    reached = sum(count for total, count in ways.items() if total >= sum(differences))
    return reached / 2 ** sum(map(bool, differences))


def exact_p_value(worse: int, better: int) -> float:
    """P(at least `worse` of worse + better coins show heads): the chance of so many if both models fail alike.

    The exact conditional form of McNemar's test (McNemar, "Note on the sampling error of the difference between
    correlated proportions or percentages", Psychometrika 12, 1947), one-sided: only questions on which the two differ
    say anything. 1 when there are none.
    """
    n = worse + better
    return sum(comb(n, k) for k in range(worse, n + 1)) / 2**n


def judge_paired(paired: Paired, *, max_increase: float, alpha: float) -> Verdict:
    """Fail: worse by more than `max_increase`, and chance explains it less often than `alpha`.

    Inconclusive: worse by more than that, and chance may explain it. Pass: not worse by more than that.
    """
    if paired.increase <= max_increase:
        return Verdict.PASS
    return Verdict.FAIL if paired.p_value <= alpha else Verdict.INCONCLUSIVE


def worst_verdict(verdicts: Sequence[Verdict]) -> Verdict:
    """Of several comparisons. For the whole to have one chance of a false alarm, each gets its part of alpha."""
    return next((verdict for verdict in (Verdict.FAIL, Verdict.INCONCLUSIVE) if verdict in verdicts), Verdict.PASS)
