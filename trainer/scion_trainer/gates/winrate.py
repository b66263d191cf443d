"""The win-rate gate: a judge compares the candidate's answers with the champion's, each pair in both orders.

The judge is a model behind an endpoint if one is configured, else the reward model that passed its own gate; without
either nothing is compared. Ties count half; how often a verdict hung on the order is told. A prompt is one comparison,
however often it was asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scion_adapters.errors import UnavailableError
from scion_trainer.gates.behaviour import ask, choose_prompts
from scion_trainer.gates.sample_size import more_comparisons, wilson_interval
from scion_trainer.gates.types import Bound, GateContext, GateResult, Verdict
from scion_trainer.judges import TIE, Pair

MIN_COMPARED = 10


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the candidate's answer got against the champion's, 0..1: shown first, and shown second."""

    shown_first: float
    shown_second: float

    @property
    def score(self) -> float:
        return (self.shown_first + self.shown_second) / 2


class WinRateGate:
    name = "winrate"
    needs_server = True

    def run(self, context: GateContext) -> GateResult:
        judge = context.judge()
        if judge is None:
            reason = "nobody to judge: no reward model has passed its gate, and gates.judge_url is not set"
            return GateResult(self.name, Verdict.UNMEASURABLE, reason)
        prompts = choose_prompts(context)
        if not prompts:
            return GateResult(self.name, Verdict.UNMEASURABLE, "no prompt fits the server's max_model_len")
        answers = ask(context, prompts)
        ours = [answer.text for answer in answers[context.models.candidate][1]]
        theirs = [answer.text for answer in answers[context.models.parent][1]]
        asked = list(zip(prompts, ours, theirs, strict=True))
        context.progress("comparing answers", 0, 1)
        try:
            verdicts = judge.prefer(
                [Pair(prompt, a, b) for prompt, a, b in asked] + [Pair(prompt, b, a) for prompt, a, b in asked]
            )
        except UnavailableError as error:  # the judge's absence is not the server's
            return GateResult(self.name, Verdict.UNMEASURABLE, str(error))
        finally:
            judge.close()
        context.progress("comparing answers", 1, 1)
        comparisons = [
            Comparison(first, 1 - second)
            for first, second in zip(verdicts[: len(asked)], verdicts[len(asked) :], strict=True)
            if first is not None and second is not None
        ]
        return decide(
            comparisons,
            wanted=context.bounds.min_win_rate,
            num_unread=len(asked) - len(comparisons),
            judge=judge.name,
        )


def decide(comparisons: Sequence[Comparison], *, wanted: float, num_unread: int = 0, judge: str = "") -> GateResult:
    """Pure. Fail: the win rate's 95% interval (Wilson) lies below `wanted`. Pass: it lies above. Else inconclusive,
    with the number of comparisons that are lacking.
    """
    num = len(comparisons)
    figures = {"compared": float(num), "unread": float(num_unread)}
    if num < MIN_COMPARED:
        reason = f"{num} comparisons by {judge or 'the judge'}, at least {MIN_COMPARED} are needed"
        return GateResult("winrate", Verdict.UNMEASURABLE, reason, figures)
    rate = sum(comparison.score for comparison in comparisons) / num
    low, high = wilson_interval(rate, num)
    figures |= {
        "win_rate": rate,
        "win_rate_low": low,
        "win_rate_high": high,
        "ties": sum(comparison.score == TIE for comparison in comparisons) / num,
        "order_dependent": sum(c.shown_first != c.shown_second for c in comparisons) / num,
        "order_bias": sum(c.shown_first - c.shown_second for c in comparisons) / (2 * num),
    }
    reason = f"wins {rate:.1%} of {num} comparisons with the champion (95%: {low:.1%} to {high:.1%}; judge: {judge})"
    verdict = Verdict.PASS if low > wanted else Verdict.FAIL if high < wanted else Verdict.INCONCLUSIVE
    if verdict is Verdict.INCONCLUSIVE:
        reason += f"; {more_comparisons(rate, wanted, num)}"
    details = {"wins": [comparison.score for comparison in comparisons]}
    return GateResult("winrate", verdict, reason, figures, (Bound("win_rate", low=wanted),), details)
