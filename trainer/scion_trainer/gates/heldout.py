"""The held-out gate: on ratings that no run trained on, the candidate prefers liked answers more than its parent does.

For every held-out answer, d = mean over its tokens (end of turn included) of log p(candidate) - log p(parent). The
statistic is the mean d of liked answers minus the mean d of disliked ones. It is zero when the candidate changed
nothing, whatever the length or the manner of the answers. Users, not votes, are the units of its interval.

It is measured twice: on users that no run learns from, and on the newest answers of those it did learn from, because
what users ask and like changes with time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scion_adapters.errors import InvalidInputError
from scion_feedback.selection import SnapshotRow
from scion_trainer.gates.sample_size import more_units
from scion_trainer.gates.types import Bound, GateContext, GateResult, Verdict
from scion_trainer.server_client import Message

MAX_ROWS = 1000
NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
MIN_USERS = 4
"""With fewer, resampling them says nothing: on the demo, two users gave "certain" intervals around noise."""
MIN_RATED = 10
"""Liked answers, and disliked ones, from which on the statistic alone may fail a version."""


@dataclass(frozen=True, slots=True)
class RatedText:
    """One answer that one user liked or did not. `user` is a hash."""

    messages: Sequence[Message]
    text: str
    liked: bool
    user: str


@dataclass(frozen=True, slots=True)
class Shift:
    """By how much (nats per token) an answer became likelier than under the parent."""

    d: float
    liked: bool
    user: str


class HeldoutGate:
    name = "heldout"
    needs_server = True

    def run(self, context: GateContext) -> GateResult:
        by_split = []
        for rows in (context.heldout, context.newest):
            shifts, num_left_out = measure(context, rated_texts(rows)[:MAX_ROWS])
            margin = context.bounds.heldout_margin
            by_split.append(decide(shifts, margin=margin, num_left_out=num_left_out, seed=context.seed))
        return combine(*by_split)


def rated_texts(rows: Sequence[SnapshotRow]) -> list[RatedText]:
    """A rating is one text; a correction is two: what the user wrote is liked, the answer it replaces is not."""
    texts = []
    for row in rows:
        user = row.user_hash or row.feedback_id  # a vote without a user stands for itself
        if row.kind == "correction" and row.correction:
            texts.append(RatedText(row.messages, row.correction, True, user))
            texts.append(RatedText(row.messages, row.answer, False, user))
        elif row.liked is not None:
            texts.append(RatedText(row.messages, row.answer, row.liked, user))
    return texts


def measure(context: GateContext, texts: Sequence[RatedText]) -> tuple[list[Shift], int]:
    """The shifts, and how many texts were too long for the server or not renderable."""
    items, kept = [], []
    for text in texts:
        try:
            prompt, answer = context.tokens.prompt(text.messages), context.tokens.answer(text.text)
        except InvalidInputError:
            continue
        if len(prompt) + len(answer) < context.max_length:
            items.append((prompt, answer))
            kept.append(text)
    context.progress("held-out answers", 0, 2)
    ours = context.server.score(context.models.candidate, items)
    context.progress("held-out answers", 1, 2)
    theirs = context.server.score(context.models.parent, items)
    context.progress("held-out answers", 2, 2)
    shifts = [
        Shift(float(np.mean(a) - np.mean(b)), text.liked, text.user)
        for a, b, text in zip(ours, theirs, kept, strict=True)
    ]
    return shifts, len(texts) - len(kept)


def decide(shifts: Sequence[Shift], *, margin: float, num_left_out: int = 0, seed: int = 0) -> GateResult:
    """Pure. Fail: the statistic is at or below `margin`, on enough ratings or with its whole interval.

    Pass: the whole interval is above `margin`. Inconclusive: anything else. Unmeasurable: no liked or no disliked
    answers.
    """
    liked = [shift.d for shift in shifts if shift.liked]
    disliked = [shift.d for shift in shifts if not shift.liked]
    num_users = len({shift.user for shift in shifts})
    figures = {
        "liked": float(len(liked)),
        "disliked": float(len(disliked)),
        "users": float(num_users),
        "left_out": float(num_left_out),
    }
    if not liked or not disliked:
        lacking = "liked" if not liked else "disliked"
        reason = f"no {lacking} held-out answer to compare with ({len(liked)} liked, {len(disliked)} disliked)"
        return GateResult("heldout", Verdict.UNMEASURABLE, reason, figures)
    statistic = float(np.mean(liked) - np.mean(disliked))
    low, high = user_interval(shifts, seed=seed)
    figures |= {
        "separation": statistic,
        "separation_low": low,
        "separation_high": high,
        "liked_shift": float(np.mean(liked)),
        "disliked_shift": float(np.mean(disliked)),
    }
    told = f"separates liked from disliked by {statistic:+.3g} nats per token more than the parent"
    about = f"{told} (95% over {num_users} users: {low:.3g} to {high:.3g}; needed: above {margin:g})"
    is_enough = num_users >= MIN_USERS and min(len(liked), len(disliked)) >= MIN_RATED
    if low > margin:
        verdict = Verdict.PASS
    elif high <= margin or math.isnan(statistic) or (is_enough and statistic <= margin):
        verdict = Verdict.FAIL
    else:
        verdict = Verdict.INCONCLUSIVE
        more = more_units(statistic, margin, low, high, num_users) or max(0, MIN_USERS - num_users)
        about += f"; about {more} more users needed" if more else ""
    details = {"liked_shifts": liked, "disliked_shifts": disliked}
    return GateResult("heldout", verdict, about, figures, (Bound("separation", low=margin),), details)


def combine(unseen: GateResult, newest: GateResult) -> GateResult:
    """Pure. The verdict on unseen users, unless the newest answers fail; the newest alone can pass nothing."""
    verdict = Verdict.FAIL if newest.verdict is Verdict.FAIL else unseen.verdict
    figures = {**unseen.figures, **{f"newest_{name}": value for name, value in newest.figures.items()}}
    bounds = (
        *unseen.bounds,
        *(Bound(f"newest_{bound.figure}", bound.low, bound.high) for bound in newest.bounds),
    )
    details = {**unseen.details, **{f"newest_{name}": value for name, value in newest.details.items()}}
    reason = f"unseen users {unseen.verdict}: {unseen.reason}; newest answers {newest.verdict}: {newest.reason}"
    return GateResult("heldout", verdict, reason, figures, bounds, details)


def user_interval(shifts: Sequence[Shift], *, seed: int) -> tuple[float, float]:
    """Percentile bootstrap of the statistic with users as units (cluster bootstrap: Field and Welsh, 2007).

    (-inf, inf) when there are fewer than MIN_USERS.
    """
    users = sorted({shift.user for shift in shifts})
    if len(users) < MIN_USERS:
        return float("-inf"), float("inf")
    index = {user: i for i, user in enumerate(users)}
    sums = np.zeros((len(users), 4))  # per user: sum and count of liked, sum and count of disliked
    for shift in shifts:
        sums[index[shift.user], 0 if shift.liked else 2] += shift.d
        sums[index[shift.user], 1 if shift.liked else 3] += 1
    generator = np.random.default_rng(seed)
    drawn = sums[generator.integers(0, len(users), size=(NUM_RESAMPLES, len(users)))].sum(axis=1)
    drawn = drawn[(drawn[:, 1] > 0) & (drawn[:, 3] > 0)]
    if len(drawn) < NUM_RESAMPLES // 2:  # liking and disliking come from almost separate users: too few to say anything
        return float("-inf"), float("inf")
    statistics = drawn[:, 0] / drawn[:, 1] - drawn[:, 2] / drawn[:, 3]
    tail = (1 - CONFIDENCE) / 2
    return float(np.quantile(statistics, tail)), float(np.quantile(statistics, 1 - tail))
