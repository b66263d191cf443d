"""The parity gate: the server finds held-out answers as likely as the trainer did when it exported the version.

What is served is what was trained only if both hold the same quantized base and read the adapter alike: NF4 on both
sides differs by 0.002 nats per token, a bf16 base by 0.05. The trainer's half is written by scion_trainer.parity.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scion_trainer.gates.types import Bound, GateContext, GateResult, Verdict, judge_bounds
from scion_trainer.parity import comparable, read_parity

MIN_TOKENS = 20


class ParityGate:
    name = "parity"
    needs_server = True

    def run(self, context: GateContext) -> GateResult:
        recorded = None if context.run_directory is None else read_parity(context.run_directory)
        if recorded is None:
            reason = "the trainer's log-probs are not at hand: the version was imported, or its run is on another host"
            return GateResult(self.name, Verdict.UNMEASURABLE, reason)
        items = comparable(context.heldout, context.tokens, max_length=context.max_length)
        known = [record for record in recorded if record.key in items]
        context.progress("parity", 0, 1)
        served = context.server.score(context.models.candidate, [items[record.key] for record in known])
        context.progress("parity", 1, 1)
        pairs = list(zip((record.logprobs for record in known), served, strict=True))
        return decide(pairs, max_delta=context.bounds.parity_max_delta)


def decide(pairs: Sequence[tuple[Sequence[float], Sequence[float]]], *, max_delta: float) -> GateResult:
    """Pure. `pairs` are (trainer, server) log-probs of one answer's tokens each.

    Fail when the mean absolute difference over tokens is above `max_delta`, or when the two sides did not cut an answer
    into equally many tokens. Unmeasurable below MIN_TOKENS tokens.
    """
    uneven = sum(len(trainer) != len(server) for trainer, server in pairs)
    deltas = [
        server - trainer
        for trainers, servers in pairs
        if len(trainers) == len(servers)
        for trainer, server in zip(trainers, servers, strict=True)
    ]
    figures = {"answers": float(len(pairs)), "tokens": float(len(deltas)), "uneven": float(uneven)}
    if len(deltas) < MIN_TOKENS and not uneven:
        reason = (
            f"{len(deltas)} tokens to compare, at least {MIN_TOKENS} are needed: there are too few held-out answers"
        )
        return GateResult("parity", Verdict.UNMEASURABLE, reason, figures)
    figures["mean_delta"] = float(np.mean(np.abs(deltas))) if deltas else float("nan")
    figures["bias"] = float(np.mean(deltas)) if deltas else float("nan")
    bounds = (Bound("mean_delta", high=max_delta), Bound("uneven", high=0.0))
    return judge_bounds("parity", figures, bounds, deltas=deltas)
