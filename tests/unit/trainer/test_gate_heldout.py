"""The held-out gate: what counts as an answer that was liked, and when the shifts are good enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from scion_feedback.selection import SnapshotRow
from scion_trainer.gates.heldout import HeldoutGate, RatedText, Shift, decide, rated_texts, user_interval
from scion_trainer.gates.types import Verdict
from tests.helpers.fake_server import END, Persona
from tests.helpers.gates import gate_context, question
from tests.helpers.training import snapshot_row


def shifts(liked: float, disliked: float, *, users: int, each: int = 2, wobble: float = 0.0) -> list[Shift]:
    """`each` liked and `each` disliked answers of every user; users sway by about `wobble`, up and down in turn."""
    found = []
    for user in range(users):
        sway = wobble * (-1) ** user * (1 + user / 10)
        found += [Shift(liked + sway, True, f"u{user}") for _ in range(each)]
        found += [Shift(disliked, False, f"u{user}") for _ in range(each)]
    return found


@pytest.mark.parametrize(
    ("measured", "margin", "verdict"),
    [
        (shifts(0.2, -0.2, users=12), 0.0, Verdict.PASS),  # every user agrees
        (shifts(-0.2, 0.2, users=12), 0.0, Verdict.FAIL),  # learnt the opposite
        (shifts(0.3, 0.3, users=12), 0.0, Verdict.FAIL),  # all answers likelier, liked or not: nothing was learnt
        (shifts(0.0, 0.0, users=12), 0.0, Verdict.FAIL),  # changed nothing
        (shifts(0.2, 0.1, users=12), 0.1, Verdict.FAIL),  # exactly the margin is not above it
        (shifts(0.05, 0.0, users=12), 0.1, Verdict.FAIL),  # better, and by less than was asked for
        (
            shifts(0.1, 0.0, users=12, wobble=1.0),
            0.0,
            Verdict.INCONCLUSIVE,
        ),  # users disagree: more good than bad, so far
        (shifts(-0.1, 0.0, users=12, wobble=1.0), 0.0, Verdict.FAIL),  # enough ratings, and on the whole no better
        (
            shifts(-0.1, 0.0, users=4, wobble=1.0),
            0.0,
            Verdict.INCONCLUSIVE,
        ),  # the same from 8 liked answers says little
        (shifts(0.2, -0.2, users=3), 0.0, Verdict.INCONCLUSIVE),  # three users are not the public
        (shifts(-0.2, 0.2, users=3, each=20), 0.0, Verdict.INCONCLUSIVE),  # nor is that many votes of theirs
        (shifts(math.nan, 0.0, users=12), 0.0, Verdict.FAIL),  # not a number is not better
        ([Shift(0.5, True, "u0")], 0.0, Verdict.UNMEASURABLE),  # nothing disliked to compare with
        ([Shift(0.5, False, "u0")], 0.0, Verdict.UNMEASURABLE),  # nothing liked
        ([], 0.0, Verdict.UNMEASURABLE),  # an imported version without a snapshot
    ],
)
def test_the_decision(measured: Sequence[Shift], margin: float, verdict: Verdict) -> None:
    result = decide(measured, margin=margin)
    assert result.verdict is verdict, result.reason
    assert result.reason


def test_the_interval_has_users_as_units() -> None:
    # One user's 100 votes are no more certain than that user.
    few_votes = shifts(0.1, 0.0, users=8, each=1, wobble=0.2)
    many_votes = [shift for shift in few_votes for _ in range(100)]
    assert user_interval(few_votes, seed=1) == pytest.approx(user_interval(many_votes, seed=1))
    low, high = user_interval(few_votes, seed=1)
    assert low < 0.1 < high


def test_users_who_only_like_and_users_who_only_dislike_are_both_resampled() -> None:
    apart = [Shift(0.2 if i % 2 else -0.2, bool(i % 2), f"u{i}") for i in range(12)]
    assert user_interval(apart, seed=0) == pytest.approx((0.4, 0.4))


def test_a_correction_is_a_liked_and_a_disliked_answer() -> None:
    corrected = snapshot_row(kind="correction", answer="wrong", correction="right", liked=None)
    rated = snapshot_row(answer="hello", liked=False, user_hash=None, feedback_id="fb-9")
    silent = snapshot_row(liked=None)
    assert rated_texts([corrected, rated, silent]) == [
        RatedText(corrected.messages, "right", True, "u"),
        RatedText(corrected.messages, "wrong", False, "u"),
        RatedText(rated.messages, "hello", False, "fb-9"),  # no user: the vote stands for itself
    ]


def finds(liking: float) -> Persona:
    """Finds answers that begin with "g" likelier by `liking` nats per token than all others."""
    return Persona(finds=lambda prompt, before, token: -2.0 + (liking if (*before, token)[0] == ord("g") else 0.0))


def rated_rows() -> list[SnapshotRow]:
    return [
        question(f"{text} {user}", answer=text, liked=text == "good", user_hash=f"u{user}")
        for user in range(6)
        for text in ("good", "bad")
    ]


def test_a_candidate_that_finds_liked_answers_likelier_passes() -> None:
    context = gate_context({"chat:7": finds(0.0), "chat:8": finds(1.0)}, rows=rated_rows())
    result = HeldoutGate().run(context)
    assert result.verdict is Verdict.PASS
    assert result.figures["separation"] == pytest.approx(1.0)
    assert (result.figures["liked"], result.figures["disliked"], result.figures["users"]) == (6, 6, 6)


def test_the_parent_is_what_it_is_compared_with() -> None:
    # The base would make it look better; the parent liked those answers just as much.
    context = gate_context({"base": finds(0.0), "chat:7": finds(1.0), "chat:8": finds(1.0)}, rows=rated_rows())
    assert HeldoutGate().run(context).figures["separation"] == pytest.approx(0.0)


def test_the_end_of_the_turn_counts() -> None:
    # The candidate only finds the end of liked answers ("good": 5 tokens with the end) less likely.
    ends = Persona(finds=lambda prompt, before, token: -2.0 - (5.0 if token == END and before[0] == ord("g") else 0.0))
    context = gate_context({"chat:7": finds(0.0), "chat:8": ends}, rows=rated_rows())
    assert HeldoutGate().run(context).figures["liked_shift"] == pytest.approx(-1.0)


def test_rows_that_cannot_be_asked_are_counted() -> None:
    rows = [
        *rated_rows(),
        question("long", answer="x" * 2000),  # longer than the server takes
        snapshot_row(split="heldout", messages=[{"role": "refused", "content": "x"}]),  # the template refuses the role
        snapshot_row(split="train", answer="good"),  # trained on: never asked
    ]
    result = HeldoutGate().run(gate_context({"chat:8": finds(1.0)}, rows=rows))
    assert (result.figures["left_out"], result.figures["liked"]) == (2, 6)


def newest_rows(*, turned: bool) -> list[SnapshotRow]:
    """Newer answers of other users; `turned`: they now like what they disliked."""
    rows = [
        question(f"new {text} {user}", answer=text, liked=(text == "good") is not turned, user_hash=f"n{user}")
        for user in range(12)
        for text in ("good", "bad")
    ]
    return [replace(row, split="newest") for row in rows]


@pytest.mark.parametrize(("turned", "verdict"), [(False, Verdict.PASS), (True, Verdict.FAIL)])
def test_the_newest_answers_have_figures_of_their_own_and_can_reject(turned: bool, verdict: Verdict) -> None:
    context = gate_context({"chat:8": finds(1.0)}, rows=[*rated_rows(), *newest_rows(turned=turned)])
    result = HeldoutGate().run(context)
    assert result.verdict is verdict, result.reason
    assert result.figures["separation"] == pytest.approx(1.0)
    assert result.figures["newest_separation"] == pytest.approx(-1.0 if turned else 1.0)
    assert [bound.figure for bound in result.bounds] == ["separation", "newest_separation"]


def test_the_newest_answers_alone_pass_nothing() -> None:
    result = HeldoutGate().run(gate_context({"chat:8": finds(1.0)}, rows=newest_rows(turned=False)))
    assert result.verdict is Verdict.UNMEASURABLE


def test_an_inconclusive_verdict_says_how_much_is_lacking() -> None:
    undecided = decide(shifts(0.1, 0.0, users=12, wobble=1.0), margin=0.0)
    assert "more users needed" in undecided.reason
    assert "about 1 more users needed" in decide(shifts(0.2, -0.2, users=3), margin=0.0).reason
