"""The red-team gate: a suite of probes is asked of the candidate, its parent and the base; worse than either fails.

The decision is relative, because a small base fails probes that no training of thumbs teaches it to pass; an absolute
bound can be added. Against the base too, or a little damage per version would add up. What failed is handed on as
findings, for the next run to learn from (scion_feedback.findings).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scion_adapters.sections.gates import GatesSection
from scion_trainer.gates.paired import Paired, compare, judge_paired, worst_verdict
from scion_trainer.gates.types import Bound, GateContext, GateResult, Verdict
from scion_trainer.red_team.attack import Attempt, attack, by_category, findings, fitting_probes
from scion_trainer.red_team.suite import load_suite

NAME = "red_team"


class RedTeamGate:
    name = NAME
    needs_server = True

    def run(self, context: GateContext) -> GateResult:
        suite = load_suite(context.settings)
        max_tokens = context.bounds.max_tokens
        probes = fitting_probes(suite.probes, context.tokens, longest_prompt=context.max_length - max_tokens)
        if not probes:
            reason = f"none of the {len(suite.probes)} probes of {suite.origin} fits the base's template and length"
            return GateResult(NAME, Verdict.UNMEASURABLE, f"{reason}: raise trainer.max_length, or shorten the suite")
        models = context.models
        names = list(dict.fromkeys((models.base, models.parent, models.candidate)))
        attempts = {}
        for step, model in enumerate(names):
            context.progress("red team", step, len(names))
            attempts[model] = attack(context.server, model, probes, max_tokens=max_tokens)
        context.progress("red team", len(names), len(names))
        others = {"parent": attempts[models.parent]}
        if models.base != models.parent:
            others["base"] = attempts[models.base]
        return decide(
            attempts[models.candidate],
            others,
            context.bounds,
            suite_digest=suite.digest,
            num_left_out=len(suite.probes) - len(probes),
        )


def decide(
    candidate: Sequence[Attempt],
    others: Mapping[str, Sequence[Attempt]],
    bounds: GatesSection,
    *,
    suite_digest: str = "",
    num_left_out: int = 0,
) -> GateResult:
    """Pure. `others` (the parent, the base) were asked the same probes in the same order; at least one probe.

    Fail: above `red_team_max_share`, or worse than one of the others beyond chance (paired.judge_paired).
    Inconclusive: worse than one of them by more than is allowed, and chance may explain it. Pass: anything else.
    """
    failed = [attempt.failed for attempt in candidate]
    paired = {name: compare(failed, [attempt.failed for attempt in theirs]) for name, theirs in others.items()}
    figures: dict[str, float] = {"failed_share": sum(failed) / len(failed), "probes": float(len(failed))}
    for name, found in paired.items():
        figures |= {
            f"{name}_failed_share": found.other_failed / found.asked,
            f"increase_over_{name}": found.increase,
            f"p_against_{name}": found.p_value,
        }
    figures["left_out"] = float(num_left_out)
    limits = [Bound(f"increase_over_{name}", high=bounds.red_team_max_increase) for name in others]
    verdicts = {
        name: judge_paired(found, max_increase=bounds.red_team_max_increase, alpha=bounds.probe_alpha / len(others))
        for name, found in paired.items()
    }
    reasons = [f"{_told(paired[name], name)}" for name, verdict in verdicts.items() if verdict is not Verdict.PASS]
    verdict = worst_verdict(list(verdicts.values()))
    if bounds.red_team_max_share is not None:
        absolute = Bound("failed_share", high=bounds.red_team_max_share)
        limits.append(absolute)
        if not absolute.holds(figures["failed_share"]):
            verdict = Verdict.FAIL
            reasons.insert(0, f"failed_share {figures['failed_share']:.3g} (allowed: {absolute.describe()})")
    return GateResult(
        NAME,
        verdict,
        "; ".join(reasons) or f"fails {sum(failed)} of {len(failed)} probes, no worse than {' or '.join(others)}",
        figures,
        tuple(limits),
        {"categories": _categories(candidate, others), "suite": suite_digest},
        findings(candidate, suite_digest),
    )


def _told(found: Paired, name: str) -> str:
    return (
        f"fails {found.candidate_failed} of {found.asked} probes, the {name} {found.other_failed} "
        f"({found.newly_failed} only the candidate, {found.no_longer_failed} only the {name}; "
        f"chance explains it with p = {found.p_value:.2g})"
    )


def _categories(candidate: Sequence[Attempt], others: Mapping[str, Sequence[Attempt]]) -> list[dict[str, Any]]:
    tables = {"candidate": by_category(candidate)} | {name: by_category(theirs) for name, theirs in others.items()}
    return [
        {"category": category, "probes": asked, **{name: table[category][0] for name, table in tables.items()}}
        for category, (_, asked) in tables["candidate"].items()
    ]
