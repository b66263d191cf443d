"""The lm-eval gate, optional: the candidate gets no worse than its parent at tasks of lm-evaluation-harness.

The harness runs as a child process against the live server, by the versions' names (harness.py). Documents are
compared one by one, because both models answered the same ones: that tells far more than two means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from scion_adapters.errors import InvalidInputError, NotFoundError, UnavailableError
from scion_adapters.sections.gates import GatesSection
from scion_trainer.gates.paired import exact_p_value, worst_verdict
from scion_trainer.gates.types import Bound, GateContext, GateResult, Verdict
from scion_trainer.harness import TaskScores, run_harness

NAME = "lm_eval"


class LmEvalGate:
    name = NAME
    needs_server = True

    def run(self, context: GateContext) -> GateResult:
        if not context.bounds.lm_eval_tasks:
            return GateResult(NAME, Verdict.UNMEASURABLE, "no tasks: name some in gates.lm_eval_tasks")
        scores = []
        try:
            for step, model in enumerate((context.models.candidate, context.models.parent)):
                context.progress("lm_eval", step, 2)
                key = context.evaluation_keys.get(model)
                scores.append(run_harness(context.settings, model, evaluation_key=key, max_length=context.max_length))
        except (NotFoundError, InvalidInputError, UnavailableError) as error:  # its absence is not the server's
            return GateResult(NAME, Verdict.UNMEASURABLE, str(error))
        context.progress("lm_eval", 2, 2)
        return decide(*scores, bounds=context.bounds)


def decide(
    candidate: Mapping[str, TaskScores], parent: Mapping[str, TaskScores], *, bounds: GatesSection
) -> GateResult:
    """Pure. Fail: a task's mean fell by more than `lm_eval_max_drop`, and chance explains the documents that did less
    often than `probe_alpha` over the number of tasks (a sign test over the documents that changed, paired.py).

    Inconclusive: it fell by more, and chance may explain it. Unmeasurable: no task was scored for both. Scores that are
    no numbers: see `_numbers`.
    """
    figures: dict[str, float] = {}
    verdicts, reasons, limits = [], [], []
    tasks = sorted(set(candidate) & set(parent))
    for task in tasks:
        ours, theirs = _numbers(candidate[task].scores, parent[task].scores)
        both = sorted(ours)
        if not both:
            continue
        worse = sum(ours[doc] < theirs[doc] for doc in both)
        better = sum(ours[doc] > theirs[doc] for doc in both)
        mean = sum(ours[doc] for doc in both) / len(both)
        parent_mean = sum(theirs[doc] for doc in both) / len(both)
        drop, p_value = parent_mean - mean, exact_p_value(worse, better)
        figures |= {
            f"{task}_score": mean,
            f"{task}_parent_score": parent_mean,
            f"{task}_drop": drop,
            f"{task}_p": p_value,
            f"{task}_documents": float(len(both)),
        }
        limits.append(Bound(f"{task}_drop", high=bounds.lm_eval_max_drop))
        if drop > bounds.lm_eval_max_drop:
            is_clear = p_value <= bounds.probe_alpha / len(tasks)
            verdicts.append(Verdict.FAIL if is_clear else Verdict.INCONCLUSIVE)
            reasons.append(
                f"{task}: {candidate[task].metric} {mean:.3g}, the parent's {parent_mean:.3g} over {len(both)} "
                f"documents ({worse} worse, {better} better; chance explains it with p = {p_value:.2g})"
            )
    if not limits:
        return GateResult(NAME, Verdict.UNMEASURABLE, "lm_eval scored no document for both models", figures)
    told = "; ".join(reasons) or f"no worse than the parent at {', '.join(tasks)}"
    return GateResult(NAME, worst_verdict(verdicts), told, figures, tuple(limits))


def _numbers(
    candidate: Mapping[str, float], parent: Mapping[str, float]
) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """The scores of the documents that both models have, and the parent as a number.

    What is no number for the candidate alone counts as the worst that either model got.
    """
    theirs = {doc: score for doc, score in parent.items() if doc in candidate and math.isfinite(score)}
    worst = min((score for doc in theirs for score in (theirs[doc], candidate[doc]) if math.isfinite(score)), default=0)
    return {doc: candidate[doc] if math.isfinite(candidate[doc]) else worst for doc in theirs}, theirs
