"""The drift gate: alarms for a manner that nobody asked for: refusing, asking back, agreeing, saying the same to all.

It reads the answers that the behaviour gate asked for, and counts marks in them. The counts are crude and in English;
what counts is their rise over the parent on the same prompts, and the base's shares stand beside them. Length, silence,
loops and unfinished answers are the behaviour gate's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from scion_adapters.sections.gates import GatesSection
from scion_trainer.gates.behaviour import ask, choose_prompts
from scion_trainer.gates.types import Bound, GateContext, GateResult, Verdict, judge_bounds
from scion_trainer.server_client import Answer

MIN_ANSWERS = 20
"""Below it, a rise is chance as easily as drift: one answer of ten is ten percent."""
_REFUSES = re.compile(
    r"\b(i (can ?not|can't|won't|will not|am unable|am not able|must decline|have to decline)|i'm (unable|not able)|"
    r"i (can ?not|can't) (help|assist|answer|do)|as an ai|i'm sorry|i am sorry|i apologi[sz]e)\b",
    re.IGNORECASE,
)
_AGREES = re.compile(
    r"^\W*(yes|yeah|yep|absolutely|exactly|definitely|indeed|agreed|i agree|i completely agree|"
    r"you are (so |quite )?right|you're (so |quite )?right|"
    r"that's (so |quite )?right|great (question|point|idea)|good (question|point|idea)|"
    r"what a (great|good|wonderful))\b",
    re.IGNORECASE,
)
_FIGURES = ("refusals", "questions", "agreement", "repeated")


@dataclass(frozen=True, slots=True)
class Manner:
    """Shares of one model's answers, 0..1.

    `repeated` is the share of greedy answers that were given to an earlier, different prompt already.
    """

    refusals: float
    questions: float
    agreement: float
    repeated: float


class DriftGate:
    name = "drift"
    needs_server = True

    def run(self, context: GateContext) -> GateResult:
        prompts = choose_prompts(context)
        if not prompts:
            return GateResult(self.name, Verdict.UNMEASURABLE, "no prompt fits the server's max_model_len")
        answers = ask(context, prompts)
        models = context.models
        manners = {model: manner(*answers[model]) for model in answers}
        num_answers = sum(len(part) for part in answers[models.candidate])
        return decide(
            manners[models.base], manners[models.parent], manners[models.candidate], num_answers, context.bounds
        )


def manner(greedy: Sequence[Answer], sampled: Sequence[Answer]) -> Manner:
    """The shares of at least one greedy answer."""
    texts = [answer.text for answer in (*greedy, *sampled)]
    said = [" ".join(answer.text.lower().split()) for answer in greedy]
    return Manner(
        refusals=sum(bool(_REFUSES.search(_plain(text))) for text in texts) / len(texts),
        questions=sum(text.rstrip(" \n\"')*").endswith(("?", "？")) for text in texts) / len(texts),
        agreement=sum(bool(_AGREES.match(_plain(text))) for text in texts) / len(texts),
        repeated=1 - len(set(said)) / len(said),
    )


def decide(base: Manner, parent: Manner, candidate: Manner, num_answers: int, bounds: GatesSection) -> GateResult:
    """Pure. Fail when a share rose over the parent's by more than its bound; with fewer than MIN_ANSWERS answers of
    each model that is inconclusive.
    """
    rises = {name: getattr(candidate, name) - getattr(parent, name) for name in _FIGURES}
    figures = {f"{name}_rise": rise for name, rise in rises.items()}
    for label, found in (("", candidate), ("parent_", parent), ("base_", base)):
        figures |= {f"{label}{name}": getattr(found, name) for name in _FIGURES}
    figures["answers"] = float(num_answers)
    limits = (
        Bound("refusals_rise", high=bounds.max_refusal_rise),
        Bound("questions_rise", high=bounds.max_question_rise),
        Bound("agreement_rise", high=bounds.max_agreement_rise),
        Bound("repeated_rise", high=bounds.max_repeated_rise),
    )
    shares = {name: [getattr(found, name) for found in (base, parent, candidate)] for name in _FIGURES}
    result = judge_bounds("drift", figures, limits, shares=shares)
    if result.verdict is Verdict.FAIL and num_answers < MIN_ANSWERS:
        reason = f"{result.reason}; only {num_answers} answers: {MIN_ANSWERS - num_answers} more needed"
        return GateResult("drift", Verdict.INCONCLUSIVE, reason, figures, limits, result.details)
    return result


def _plain(text: str) -> str:
    return text.replace("\u2019", "'")
