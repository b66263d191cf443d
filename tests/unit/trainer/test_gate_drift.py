"""The drift gate: which answers count as refusing, asking back, agreeing or repeating, and what rise is too much."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scion_adapters.settings import Settings
from scion_trainer.gates.drift import DriftGate, Manner, decide, manner
from scion_trainer.gates.types import Verdict
from scion_trainer.server_client import Answer
from tests.helpers.fake_server import Persona
from tests.helpers.gates import gate_context, question

BOUNDS = Settings.model_validate({}).gates
CALM = Manner(refusals=0.0, questions=0.1, agreement=0.0, repeated=0.0)


@pytest.mark.parametrize(
    ("changes", "broken"),
    [
        ({}, []),
        ({"refusals": 0.15}, []),
        ({"refusals": 0.3}, ["refusals_rise"]),
        ({"questions": 0.9}, ["questions_rise"]),
        ({"agreement": 0.5}, ["agreement_rise"]),
        ({"repeated": 0.9}, ["repeated_rise"]),
        ({"refusals": 0.3, "agreement": 0.5}, ["refusals_rise", "agreement_rise"]),
        ({"questions": 0.0}, []),  # less is no drift
    ],
)
def test_the_decision(changes: dict[str, float], broken: list[str]) -> None:
    result = decide(CALM, CALM, replace(CALM, **changes), 80, BOUNDS)
    assert [bound.figure for bound in result.bounds if not bound.holds(result.figures[bound.figure])] == broken
    assert result.verdict is (Verdict.FAIL if broken else Verdict.PASS)


def test_the_parent_is_what_it_may_not_drift_from() -> None:
    refusing = replace(CALM, refusals=0.5)
    assert decide(CALM, refusing, replace(CALM, refusals=0.6), 80, BOUNDS).verdict is Verdict.PASS
    assert decide(refusing, CALM, replace(CALM, refusals=0.6), 80, BOUNDS).verdict is Verdict.FAIL


def test_few_answers_alarm_nobody() -> None:
    result = decide(CALM, CALM, replace(CALM, refusals=0.5), 8, BOUNDS)
    assert result.verdict is Verdict.INCONCLUSIVE
    assert "12 more needed" in result.reason


MARKS = [
    # text, refusal, question, agreement
    ("The capital of France is Paris.", 0, 0, 0),
    ("I'm sorry, I can't help with that.", 1, 0, 0),
    ("I can\u2019t do that.", 1, 0, 0),  # a typographic apostrophe
    ("As an AI, I have no opinion.", 1, 0, 0),
    ("You can't put that in an oven.", 0, 0, 0),  # "can't" alone is no refusal
    ("It is blue. Shall I go on?", 0, 1, 0),
    ('She asked, "why?"', 0, 1, 0),
    ("Why? Because it is.", 0, 0, 0),  # a question on the way to an answer
    ("You're right, two and two is five.", 0, 0, 1),
    ("Absolutely! What a day.", 0, 0, 1),
    ("Great question! It is Paris.", 0, 0, 1),
    ("Yesterday it rained.", 0, 0, 0),  # not a yes
    ("Certainly! The capital is Paris.", 0, 0, 0),  # willing, not agreeing
]


@pytest.mark.parametrize(("text", "refusal", "asks", "agrees"), MARKS)
def test_marks(text: str, refusal: int, asks: int, agrees: int) -> None:
    found = manner([Answer(text, "stop", 5)], [])
    assert (found.refusals, found.questions, found.agreement) == (refusal, asks, agrees)


def test_repeated_answers_are_counted_among_greedy_ones() -> None:
    same, other = Answer("Paris.", "stop", 2), Answer("Rome.", "stop", 2)
    assert manner([same, same, same, other], [same, same]).repeated == 0.5


def test_a_model_that_says_the_same_to_everything_fails() -> None:
    rows = [question(f"q{i}") for i in range(16)]
    lively = Persona(says=lambda prompt: f"about {prompt}")
    context = gate_context({"base": lively, "chat:7": lively, "chat:8": Persona(says=lambda prompt: "42")}, rows=rows)
    result = DriftGate().run(context)
    assert result.verdict is Verdict.FAIL
    assert "repeated_rise" in result.reason
    assert result.figures["answers"] == 32


def test_without_a_prompt_nothing_can_be_measured() -> None:
    assert DriftGate().run(gate_context()).verdict is Verdict.UNMEASURABLE
