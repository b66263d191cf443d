"""The behaviour gate: which conduct is within bounds, which prompts are asked, what is measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scion_adapters.settings import Settings
from scion_trainer.gates.behaviour import (
    BehaviourGate,
    BehaviourMeasurement,
    Conduct,
    choose_prompts,
    conduct,
    decide,
    is_looping,
)
from scion_trainer.gates.types import Verdict
from scion_trainer.server_client import Answer
from tests.helpers.fake_server import Persona
from tests.helpers.gates import gate_context, known_item, question
from tests.helpers.training import snapshot_row

BOUNDS = Settings.model_validate({}).gates
CALM = Conduct(empty_share=0.0, looping_share=0.0, unfinished_share=0.0, mean_tokens=20.0)
GOOD = BehaviourMeasurement(
    base=CALM,
    parent=CALM,
    candidate=CALM,
    changed_share=0.9,
    effect=1.0,
    kl_from_base=0.1,
    strange_share=0.01,
    base_strange_share=0.003,
    num_prompts=64,
)


def candidate(**changes: float) -> BehaviourMeasurement:
    return replace(GOOD, candidate=replace(CALM, **changes))


@pytest.mark.parametrize(
    ("measured", "broken"),
    [
        (GOOD, []),
        (replace(GOOD, effect=0.001, changed_share=0.0), ["effect"]),  # matches no module: answers are the base's
        (replace(GOOD, effect=0.02, changed_share=0.1), []),  # a careful learning rate changes little
        (candidate(empty_share=0.1), ["empty_share"]),  # ends at once
        (candidate(looping_share=0.2), ["looping_share"]),
        (candidate(unfinished_share=0.5), ["unfinished_share"]),  # forgot how to end
        (candidate(mean_tokens=1.0), ["length_ratio"]),  # one token where the parent gave 20
        (candidate(mean_tokens=4.0), []),  # users like it terse
        (candidate(mean_tokens=70.0), []),  # users like it rambling
        (candidate(mean_tokens=128.0), ["length_ratio"]),
        (replace(GOOD, strange_share=0.2), ["strange_share"]),  # random weights: what it says is noise
        (replace(GOOD, kl_from_base=0.7), []),  # terse answers: choosing one of four manners in two tokens
        (candidate(empty_share=0.1, looping_share=0.2), ["empty_share", "looping_share"]),  # all reasons are told
        (
            replace(GOOD, base=replace(CALM, looping_share=0.3), candidate=replace(CALM, looping_share=0.33)),
            [],  # a base that loops by itself is not the candidate's fault
        ),
        (
            replace(GOOD, parent=replace(CALM, looping_share=0.3), candidate=replace(CALM, looping_share=0.33)),
            ["looping_share"],  # a parent that loops is no excuse, or errors would add up over versions
        ),
        (replace(GOOD, parent=replace(CALM, mean_tokens=0.0)), ["length_ratio"]),  # no length to compare with
        (replace(GOOD, effect=float("nan")), ["effect"]),  # log-probs that are not numbers
    ],
)
def test_the_decision(measured: BehaviourMeasurement, broken: list[str]) -> None:
    result = decide(measured, BOUNDS)
    assert [bound.figure for bound in result.bounds if not bound.holds(result.figures[bound.figure])] == broken
    assert result.verdict is (Verdict.FAIL if broken else Verdict.PASS)
    assert all(name in result.reason for name in broken)


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("Certainly! The capital of France is Paris. Happy to help!", False),
        ("yes yes yes yes", False),  # short: may be meant
        ("I do not know. " * 8, True),
        ("the capital of the capital of the capital of the capital of the capital of the capital of France", True),
        ("a b c d e f g h i j k l m n o p q r s t u v w x y z", False),
        ("!" * 60, True),  # no spaces to split at
        ("哈哈哈哈" * 15, True),
        (" ".join(f"{n}. item number {n}" for n in range(12)), False),  # a list repeats its form, not its words
        ("", False),
    ],
)
def test_what_loops(text: str, loops: bool) -> None:
    assert is_looping(text) is loops


def test_conduct_counts_shares() -> None:
    answers = [
        Answer("  ", "stop", 1),
        Answer("fine", "stop", 3),
        Answer("on and on", "length", 8),
        Answer("x", "stop", 4),
    ]
    assert conduct(answers) == Conduct(empty_share=0.25, looping_share=0.0, unfinished_share=0.25, mean_tokens=4.0)


def test_held_out_prompts_come_first_and_each_is_asked_once() -> None:
    rows = [
        snapshot_row(messages=[{"role": "user", "content": "trained"}]),
        question("held"),
        question("held"),
        question("x" * 900),  # no room for an answer
        snapshot_row(split="heldout", messages=[{"role": "refused", "content": "x"}]),  # the template refuses it
    ]
    context = gate_context(rows=rows, retention=[known_item("known"), known_item("too many")], gates={"max_prompts": 3})
    assert [prompt[-1]["content"] for prompt in choose_prompts(context)] == ["held", "trained", "known"]


def test_a_candidate_that_answers_in_another_manner_passes_and_is_shown() -> None:
    polite = Persona(says=lambda prompt: f"gladly: {prompt}", finds=lambda prompt, before, token: -0.5)
    context = gate_context({"chat:8": polite}, rows=[question(f"q{i}") for i in range(4)])
    result = BehaviourGate().run(context)
    assert result.verdict is Verdict.PASS, result.reason
    assert result.figures["changed_share"] == 1.0
    assert result.figures["effect"] == pytest.approx(0.5)
    assert result.figures["kl_from_base"] == pytest.approx(0.5)
    assert result.details["samples"][0] == {
        "prompt": "q0",
        "base": "fine",
        "parent": "fine",
        "candidate": "gladly: q0",
    }
    assert len(result.details["lengths"]["candidate"]) == 8  # greedy and sampled


def test_an_adapter_without_effect_fails() -> None:
    result = BehaviourGate().run(gate_context(rows=[question("q")]))
    assert result.verdict is Verdict.FAIL
    assert "effect" in result.reason


def test_noise_fails_because_the_base_would_never_say_it() -> None:
    noise = Persona(says=lambda prompt: "zzzz", finds=lambda prompt, before, token: -0.1)
    base = Persona(finds=lambda prompt, before, token: -12.0 if token == ord("z") else -1.0)
    result = BehaviourGate().run(gate_context({"base": base, "chat:8": noise}, rows=[question("q")]))
    assert "strange_share" in result.reason
    assert result.verdict is Verdict.FAIL


def test_an_answer_that_was_cut_off_is_scored_without_an_end() -> None:
    endless = Persona(says=lambda prompt: "on" * 99, finds=lambda prompt, before, token: -99.0 if token == 0 else -1.0)
    context = gate_context({"chat:8": endless}, rows=[question("q")], gates={"max_tokens": 16})
    result = BehaviourGate().run(context)
    assert result.figures["unfinished_share"] == 1.0
    assert abs(result.figures["kl_from_base"]) < 1e-9  # the end, which it never said, would have made it -5.8


def test_without_a_prompt_nothing_can_be_measured() -> None:
    assert BehaviourGate().run(gate_context()).verdict is Verdict.UNMEASURABLE
