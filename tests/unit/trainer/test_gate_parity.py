"""The parity gate: what the trainer wrote down is what the server must find, token by token."""

from __future__ import annotations

from pathlib import Path

import pytest

from scion_trainer.gates.parity import ParityGate, decide
from scion_trainer.gates.types import Verdict
from scion_trainer.parity import PARITY_FILE, Recorded, comparable, read_parity
from tests.helpers.fake_server import Persona
from tests.helpers.gates import gate_context, question
from tests.helpers.training import snapshot_row

TOKENS = [-1.0] * 30


@pytest.mark.parametrize(
    ("pairs", "verdict"),
    [
        ([(TOKENS, TOKENS)], Verdict.PASS),
        ([(TOKENS, [-1.009] * 30)], Verdict.PASS),
        ([(TOKENS, [-1.02] * 30)], Verdict.FAIL),
        ([(TOKENS, [-1.05, -0.95] * 15)], Verdict.FAIL),  # differences that cancel out are differences
        ([(TOKENS, TOKENS), ([-1.0], [-1.0, -1.0])], Verdict.FAIL),  # another tokenizer
        ([(TOKENS, [float("nan")] * 30)], Verdict.FAIL),
        ([([-1.0] * 5, [-9.0] * 5)], Verdict.UNMEASURABLE),  # five tokens say nothing
        ([], Verdict.UNMEASURABLE),
    ],
)
def test_the_decision(pairs: list[tuple[list[float], list[float]]], verdict: Verdict) -> None:
    result = decide(pairs, max_delta=0.01)
    assert result.verdict is verdict, result.reason


ROWS = [question(f"q{i}", answer="good day") for i in range(4)]


def run_directory(tmp_path: Path, logprob: float) -> Path:
    values = ", ".join(f'"{row.feedback_id}": {[logprob] * 9}' for row in ROWS)
    (tmp_path / PARITY_FILE).write_text("{" + values + ', "fb-erased": [-1.0]}')
    return tmp_path


@pytest.mark.parametrize(("logprob", "verdict"), [(-1.0, Verdict.PASS), (-1.1, Verdict.FAIL)])
def test_the_same_rows_are_asked_of_the_server(tmp_path: Path, logprob: float, verdict: Verdict) -> None:
    context = gate_context(rows=ROWS, run_directory=run_directory(tmp_path, logprob))
    result = ParityGate().run(context)
    assert result.verdict is verdict, result.reason
    assert (result.figures["answers"], result.figures["tokens"]) == (4, 36)  # the end of the turn counts; erased: not


def test_only_the_candidate_is_asked(tmp_path: Path) -> None:
    strange = Persona(finds=lambda prompt, before, token: -5.0)
    context = gate_context({"base": strange, "chat:7": strange}, rows=ROWS, run_directory=run_directory(tmp_path, -1.0))
    assert ParityGate().run(context).verdict is Verdict.PASS


def test_without_a_record_nothing_is_measured(tmp_path: Path) -> None:
    assert ParityGate().run(gate_context(rows=ROWS)).verdict is Verdict.UNMEASURABLE
    assert ParityGate().run(gate_context(rows=ROWS, run_directory=tmp_path)).verdict is Verdict.UNMEASURABLE
    (tmp_path / PARITY_FILE).write_text("[torn")
    assert read_parity(tmp_path) is None


def test_liked_answers_come_first_and_a_correction_stands_for_its_answer() -> None:
    rows = [
        question("bad", liked=False),
        question("long", answer="x" * 2000),
        question("good", answer="yes"),
        question("wrong", kind="correction", answer="no", correction="right", liked=False),
        snapshot_row(messages=[{"role": "refused", "content": "x"}]),
    ]
    tokens = gate_context().tokens
    chosen = comparable(rows, tokens, max_length=1024, limit=2)
    assert list(chosen) == ["fb-good", "fb-wrong"]
    assert chosen["fb-wrong"][1] == tokens.answer("right")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    (tmp_path / PARITY_FILE).write_text('{"a": [-1, -0.5]}')
    assert read_parity(tmp_path) == [Recorded("a", (-1.0, -0.5))]
