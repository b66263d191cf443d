"""The KL gate: how far the version is from the pinned base, whatever its parent was.

A pull towards the parent alone lets drift compound: ten small steps are a large one. The figure is measured by the
trainer at the end of a run (scion_trainer.kl), on held-out prompts, and stands in the version's metrics. A run over
`trainer.kl_budget` publishes nothing; this gate holds the budget of now against versions made under an older one.
"""

from __future__ import annotations

from scion_trainer.gates.types import Bound, GateContext, GateResult, Verdict, judge_bounds

METRIC = "kl_to_base"


class KlGate:
    name = "kl"
    needs_server = False

    def run(self, context: GateContext) -> GateResult:
        found = context.version.metrics.get(METRIC)
        measured = float(found) if isinstance(found, int | float) else None
        return decide(measured, budget=context.settings.trainer.kl_budget)


def decide(kl_to_base: float | None, *, budget: float) -> GateResult:
    """Pure. `kl_to_base` in nats per token, None when the run did not measure it. Fail above `budget`."""
    if kl_to_base is None:
        reason = "no figure from the trainer: the version was imported, or its run is older than this measurement"
        return GateResult("kl", Verdict.UNMEASURABLE, reason)
    return judge_bounds("kl", {METRIC: kl_to_base, "budget_left": budget - kl_to_base}, (Bound(METRIC, high=budget),))
