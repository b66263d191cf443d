"""The KL gate: a bound on the distance from the pinned base, however near the parent is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scion_adapters.settings import Settings
from scion_trainer.gates.kl import KlGate, decide
from scion_trainer.gates.types import Verdict
from tests.helpers.gates import VERSION, gate_context


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        (0.0, Verdict.PASS),
        (0.5, Verdict.PASS),
        (0.51, Verdict.FAIL),
        (float("nan"), Verdict.FAIL),
        (None, Verdict.UNMEASURABLE),
    ],
)
def test_the_decision(measured: float | None, verdict: Verdict) -> None:
    assert decide(measured, budget=0.5).verdict is verdict


def test_the_figure_is_the_runs() -> None:
    version = replace(VERSION, metrics={"kl_to_base": 0.3})
    settings = Settings.model_validate({"trainer": {"kl_budget": 0.2}})
    result = KlGate().run(gate_context(version=version, settings=settings))
    assert (result.verdict, result.figures["kl_to_base"]) == (Verdict.FAIL, 0.3)
    assert KlGate().run(gate_context()).verdict is Verdict.UNMEASURABLE
