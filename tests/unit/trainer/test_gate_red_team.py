"""The red-team gate: worse than the parent or the base beyond chance fails, equally bad passes, findings are kept."""

from __future__ import annotations

from math import comb
from pathlib import Path

import pytest

from scion_adapters.sections.gates import GatesSection
from scion_trainer.gates.paired import compare, exact_p_value, flipped_p_value, judge_paired
from scion_trainer.gates.red_team import RedTeamGate, decide
from scion_trainer.gates.types import Verdict
from tests.helpers.fake_server import Persona
from tests.helpers.gates import gate_context
from tests.helpers.probes import attempts, probe_line

NUM = 40


def failing(count: int, *, first: int = 0) -> list[bool]:
    return [first <= i < first + count for i in range(NUM)]


@pytest.mark.parametrize(
    ("worse", "better", "p"),
    [
        (0, 0, 1.0),  # they differ nowhere
        (1, 0, 1 / 2),
        (5, 0, 1 / 32),
        (0, 5, 1.0),
        (7, 0, 1 / 128),
        (3, 1, 5 / 16),  # C(4,3) + C(4,4) of 16
        (8, 2, 56 / 1024),
    ],
)
def test_the_exact_paired_test(worse: int, better: int, p: float) -> None:
    assert exact_p_value(worse, better) == pytest.approx(p)


@pytest.mark.parametrize(
    ("differences", "p"),
    [
        ([], 1.0),
        ([0, 0], 1.0),
        ([1] * 8 + [-1] * 2 + [0] * 5, exact_p_value(8, 2)),  # McNemar's
        ([2], 1 / 2),  # one question is one coin, however often it was asked
        ([2, 2, 2, -1], 2 / 16),  # 5 or 7, of sums 7 5 3 3 3 1 1 1 and their negatives
        ([-2, -2], 1.0),
        ([3, -1, 2], 2 / 8),  # 4 or 6
    ],
)
def test_the_exact_test_of_questions_asked_more_than_once(differences: list[int], p: float) -> None:
    assert flipped_p_value(differences) == pytest.approx(p)


def test_a_question_asked_twice_counts_once() -> None:
    found = compare([2, 1, 0], [0, 1, 1], times=2)
    assert (found.asked, found.newly_failed, found.no_longer_failed) == (6, 2, 1)
    assert found.increase == pytest.approx(1 / 6)
    assert found.p_value == pytest.approx(2 / 4)  # +2 and -1 with either sign: 3 and 1 reach 1


def test_only_questions_on_which_the_two_differ_count() -> None:
    found = compare([True] * 7 + [True] * 20 + [False] * 13, [False] * 7 + [True] * 20 + [False] * 13)
    assert (found.newly_failed, found.no_longer_failed, found.increase) == (7, 0, 7 / 40)
    assert found.p_value == pytest.approx(1 / 128)


def test_false_alarms_are_as_rare_as_promised() -> None:
    """If both models fail alike, each split of n differing questions has its binomial chance; failing ones add up."""
    for n in range(1, 30):
        rate = sum(
            comb(n, worse) / 2**n
            for worse in range(n + 1)
            if judge_paired(
                compare([i < worse for i in range(n)], [i >= worse for i in range(n)]), max_increase=0.0, alpha=0.01
            )
            is Verdict.FAIL
        )
        assert rate <= 0.01


@pytest.mark.parametrize(
    ("candidate", "parent", "base", "max_share", "verdict"),
    [
        (failing(30), failing(30), failing(30), None, Verdict.PASS),  # a small base fails most, and that is no news
        (failing(0), failing(30), failing(30), None, Verdict.PASS),
        (failing(12, first=8), failing(12), failing(12), None, Verdict.PASS),  # other probes, no more of them
        (failing(10), failing(0), failing(0), None, Verdict.FAIL),
        (failing(4), failing(0), failing(0), None, Verdict.INCONCLUSIVE),  # p = 1/16
        (failing(2), failing(0), failing(0), None, Verdict.PASS),  # within what is allowed
        (failing(12), failing(10), failing(0), None, Verdict.FAIL),  # a little worse than a parent that had become bad
        (failing(12), failing(0), failing(12), None, Verdict.FAIL),  # what the parent had learned is lost
        (failing(30), failing(30), failing(30), 0.5, Verdict.FAIL),
        (failing(20), failing(20), failing(20), 0.5, Verdict.PASS),
    ],
)
def test_the_decision(
    candidate: list[bool], parent: list[bool], base: list[bool], max_share: float | None, verdict: Verdict
) -> None:
    bounds = GatesSection(red_team_max_share=max_share)
    result = decide(attempts(candidate), {"parent": attempts(parent), "base": attempts(base)}, bounds)
    assert result.verdict is verdict, result.reason
    assert result.figures["failed_share"] == sum(candidate) / NUM
    assert len(result.findings) == sum(candidate)
    assert all(bound.figure in result.figures for bound in result.bounds)


def test_the_reason_says_how_many_and_how_likely() -> None:
    result = decide(attempts(failing(10)), {"parent": attempts(failing(1))}, GatesSection())
    assert "fails 10 of 40 probes, the parent 1 (9 only the candidate, 0 only the parent" in result.reason
    assert "p = 0.002" in result.reason


def says(text: str) -> Persona:
    return Persona(says=lambda prompt: text)


@pytest.fixture
def suite(tmp_path: Path) -> dict[str, str]:
    lines = [probe_line(i, category="leak" if i < 5 else "other") for i in range(10)]
    lines += [probe_line(10, prompt="x" * 2000)]  # too long for the server
    (tmp_path / "suite.jsonl").write_text("\n".join(lines))
    return {"red_team_suite": str(tmp_path / "suite.jsonl")}


def test_a_candidate_that_tells_is_caught_and_its_answers_are_findings(suite: dict[str, str]) -> None:
    context = gate_context({"chat:8": says("a heron")}, gates=suite)
    result = RedTeamGate().run(context)
    assert result.verdict is Verdict.FAIL
    assert (result.figures["probes"], result.figures["left_out"]) == (10, 1)
    first = result.findings[0]
    assert (first.probe, first.category, first.check, first.answer) == ("p0", "leak", "must_not_contain", "a heron")
    assert first.fault == "says 'heron'"
    assert first.messages == ({"role": "user", "content": "word 0?"},)
    assert first.suite.startswith("sha256:")
    assert result.details["categories"] == [
        {"category": "leak", "probes": 5, "candidate": 5, "parent": 0, "base": 0},
        {"category": "other", "probes": 5, "candidate": 5, "parent": 0, "base": 0},
    ]


def test_a_model_no_worse_than_its_parent_passes_with_the_suite_that_ships() -> None:
    result = RedTeamGate().run(gate_context())
    assert result.verdict is Verdict.PASS
    assert 0 < result.figures["failed_share"] < 1  # "fine" refuses nothing


def test_what_no_template_can_render_cannot_be_measured(tmp_path: Path) -> None:
    (tmp_path / "suite.jsonl").write_text(probe_line(1, prompt="x" * 2000))
    result = RedTeamGate().run(gate_context(gates={"red_team_suite": str(tmp_path / "suite.jsonl")}))
    assert result.verdict is Verdict.UNMEASURABLE
    assert "trainer.max_length" in result.reason
