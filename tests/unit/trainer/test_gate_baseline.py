"""The prompt baseline: which answers are shown to the base, and whether training beat showing them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from scion_feedback.selection import SnapshotRow
from scion_trainer.gates.baseline import BaselineGate, Compared, choose_shots, decide
from scion_trainer.gates.types import Verdict
from tests.helpers.fake_server import Persona
from tests.helpers.gates import gate_context, question
from tests.helpers.training import snapshot_row


def compared(trained: float, prompted: float, *, users: int = 12, wobble: float = 0.0) -> list[Compared]:
    """A liked and a disliked answer of every user, which training and the prompt separate by that much."""
    found = []
    for user in range(users):
        sway = wobble * (-1) ** user * (1 + user / 10)
        found.append(Compared(-2.0, -2.0 + prompted, -2.0 + trained + sway, True, f"u{user}"))
        found.append(Compared(-2.0, -2.0, -2.0, False, f"u{user}"))
    return found


@pytest.mark.parametrize(
    ("rows", "margin", "verdict", "says"),
    [
        (compared(0.5, 0.2), None, Verdict.PASS, "training beat prompting: +0.3"),
        (compared(0.2, 0.5), None, Verdict.INCONCLUSIVE, "did not beat"),  # told, and no reason to reject
        (compared(0.2, 0.5), 0.0, Verdict.FAIL, "did not beat"),  # unless that was asked for
        (compared(0.5, 0.2), 0.4, Verdict.FAIL, "did not beat"),
        (compared(0.3, 0.2, wobble=1.0), 0.0, Verdict.INCONCLUSIVE, "more users needed"),
        (compared(0.5, 0.2, users=3), 0.0, Verdict.INCONCLUSIVE, "may or may not"),  # three users are not the public
        ([Compared(-1, -1, -1, True, "u")], None, Verdict.UNMEASURABLE, "both are needed"),
        ([], None, Verdict.UNMEASURABLE, "both are needed"),
    ],
)
def test_the_decision(rows: Sequence[Compared], margin: float | None, verdict: Verdict, says: str) -> None:
    result = decide(rows, margin=margin)
    assert result.verdict is verdict, result.reason
    assert says in result.reason


def trained_on(text: str, answer: str, **changes: object) -> SnapshotRow:
    messages = [{"role": "user", "content": text}]
    changes.setdefault("feedback_id", f"fb-{text}-{answer}")
    return snapshot_row(messages=messages, answer=answer, **changes)


def test_the_best_liked_answers_are_shown_first() -> None:
    rows = [
        trained_on("a", "bad", liked=False, created_at=9.0),
        trained_on("a", "good", user_hash="u1", created_at=1.0),
        trained_on("a", "good", user_hash="u2", created_at=2.0),
        trained_on("a", "also good", created_at=8.0),  # the same question is shown once
        trained_on("b", "fine", created_at=3.0),
        trained_on("c", "wrong", kind="correction", correction="right", liked=False, created_at=4.0),
        trained_on("d", "held", split="heldout", created_at=9.0),
        trained_on("e", "new", split="newest", created_at=9.0),
    ]
    shots = [(shot[0]["content"], shot[1]["content"]) for shot in choose_shots(rows, 3)]
    assert shots == [("a", "good"), ("c", "right"), ("b", "fine")]
    assert choose_shots(rows, 0) == []


def rated_rows() -> list[SnapshotRow]:
    return [
        question(f"{text} {user}", answer=text, liked=text == "good", user_hash=f"u{user}")
        for user in range(6)
        for text in ("good", "bad")
    ]


def likes(amount: float, *, with_examples: float) -> Persona:
    """Finds answers that begin with "g" likelier by `amount`, or by another when the prompt shows "Shown"."""

    def finds(prompt: Sequence[int], before: Sequence[int], token: int) -> float:
        shown = "Shown" in "".join(map(chr, prompt))
        return -2.0 + (with_examples if shown else amount) * ((*before, token)[0] == ord("g"))

    return Persona(finds=finds)


def test_training_is_compared_with_the_prompted_base() -> None:
    rows = [trained_on("Shown?", "good"), *rated_rows()]
    personas = {"base": likes(0.1, with_examples=0.4), "chat:8": likes(1.1, with_examples=9.0)}
    result = BaselineGate().run(gate_context(personas, rows=rows))
    assert result.verdict is Verdict.PASS
    assert result.figures["advantage"] == pytest.approx(1.1 - 0.4)
    assert result.figures["trained_separation"] == pytest.approx(1.0)
    assert result.figures["prompted_separation"] == pytest.approx(0.3)
    assert result.details["examples"] == [{"prompt": "Shown?", "answer": "good"}]


def test_the_answer_to_the_question_itself_is_not_shown() -> None:
    rows = [trained_on(row.messages[-1]["content"], "good") for row in rated_rows()[:1]] + rated_rows()
    result = BaselineGate().run(gate_context(rows=rows))
    assert result.figures["liked"] == 5  # the one whose only example is its own question is left out


def test_examples_that_leave_no_room_are_dropped() -> None:
    rows = [trained_on("Shown?", "good", created_at=2.0), trained_on("long", "x" * 990, created_at=1.0), *rated_rows()]
    personas = {"base": likes(0.0, with_examples=0.5)}
    result = BaselineGate().run(gate_context(personas, rows=rows))
    assert result.figures["prompted_separation"] == pytest.approx(0.5)  # by the one that fits


def test_without_liked_training_answers_there_is_nothing_to_show() -> None:
    assert BaselineGate().run(gate_context(rows=rated_rows())).verdict is Verdict.UNMEASURABLE
