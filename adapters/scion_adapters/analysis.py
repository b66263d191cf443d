"""Do users like the challenger less than the champion? The votes of a rollout, and a verdict to ask for at any time.

Units are users, not votes: one user who votes a hundred times counts once, with the mean of their votes. The comparison
is an asymptotic confidence sequence, so asking again at every tick and acting on the first clear answer is legitimate.
Knows nothing of what is done with the verdict.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

import sqlalchemy as sa

from scion_adapters.database import Database
from scion_adapters.records import RED_TEAM
from scion_adapters.tables import completions, feedback

RATING = "rating"
MIN_USERS = 10
"""Fewer users on a side are inconclusive: the guarantee is asymptotic and says nothing about the first handful."""
ALPHA = 0.001
_TUNED_USERS = 60
"""The number of users, both sides together, for which the interval is tuned to be tight. Any is valid."""


class Verdict(StrEnum):
    PASSED = "passed"  # users like the challenger more
    FAILED = "failed"  # users like the challenger less
    INCONCLUSIVE = "inconclusive"  # measured, not clear
    UNMEASURABLE = "unmeasurable"  # nobody voted on one of the two


@dataclass(frozen=True, slots=True)
class UserVotes:
    """The votes on one version: over its users, the mean of each user's mean vote (0..1) and the mean of its square."""

    users: int = 0
    votes: int = 0
    mean: float = 0.0
    mean_square: float = 0.0


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict with its figures: challenger minus champion, between `low` and `high` with 1 - alpha confidence."""

    verdict: Verdict
    difference: float
    low: float
    high: float
    message: str


def judge(champion: UserVotes, challenger: UserVotes, alpha: float = ALPHA, *, min_users: int = MIN_USERS) -> Judgement:
    """Compare the two, anytime-valid: over a whole rollout, a false `failed` or `passed` has probability about alpha.

    The interval is the asymptotic confidence sequence of Waudby-Smith et al., "Time-uniform central limit theory and
    asymptotic confidence sequences" (2021, arXiv:2103.06476), Theorem 2.2, on the difference of two means: t is the
    number of all users, and t times the variance of the difference stands for the variance. It is weak where samples
    are small (ten users who agree have no variance at all), hence `min_users`, and hence two imagined users on each
    side, one content and one not, as Agresti and Caffo (2000, The American Statistician 54:4) add them: they keep the
    variance off zero. A user who was moved to the challenger during the rollout counts once on each side.
    """
    counts = f"{challenger.users} and {champion.users} users"
    if challenger.users == 0 or champion.users == 0:
        return Judgement(Verdict.UNMEASURABLE, 0.0, -1.0, 1.0, f"no ratings on one of the two ({counts})")
    mean_a, variance_a = _smoothed(champion)
    mean_b, variance_b = _smoothed(challenger)
    difference = mean_b - mean_a
    users = champion.users + challenger.users
    variance = users * (variance_a / champion.users + variance_b / challenger.users)
    radius = math.sqrt(variance) * _standard_radius(users, alpha)
    low, high = max(difference - radius, -1.0), min(difference + radius, 1.0)
    figures = (
        f"liked {challenger.mean:.0%} against the champion's {champion.mean:.0%}, {counts}, difference between "
        f"{low:+.2f} and {high:+.2f} at {1 - alpha:.1%} confidence"
    )
    if min(champion.users, challenger.users) < min_users:
        return Judgement(
            Verdict.INCONCLUSIVE, difference, low, high, f"{figures}; at least {min_users} users a side needed"
        )
    verdict = Verdict.FAILED if high < 0 else Verdict.PASSED if low > 0 else Verdict.INCONCLUSIVE
    return Judgement(verdict, difference, low, high, figures)


def user_votes(
    database: Database, adapter: str, numbers: Collection[int], since: float, *, rollout_id: str | None = None
) -> dict[int, UserVotes]:
    """The counting ratings of each version's completions from `since` on; a version without any has zero users.

    With `rollout_id`, only of completions whose version that rollout drew at random: nobody chose what they rate.
    A vote without a user counts for its conversation; without either it has no unit and is left out.
    """
    with database.read() as connection:
        return votes_in(connection, adapter, numbers, since, rollout_id=rollout_id)


def votes_in(
    connection: sa.Connection, adapter: str, numbers: Collection[int], since: float, *, rollout_id: str | None = None
) -> dict[int, UserVotes]:
    """`user_votes` in the caller's transaction."""
    unit = sa.func.coalesce(feedback.c.user_hash, completions.c.user_hash, completions.c.conversation)
    per_user = (
        sa.select(
            completions.c.number.label("number"),
            sa.func.avg(feedback.c.value).label("value"),
            sa.func.count().label("votes"),
        )
        .join_from(completions, feedback, feedback.c.completion_id == completions.c.id)
        .where(
            completions.c.adapter == adapter,
            completions.c.number.in_(numbers),
            completions.c.created_at >= since,
            feedback.c.name == RATING,
            feedback.c.source != RED_TEAM,
            feedback.c.counts,
            feedback.c.value.is_not(None),
            feedback.c.deleted_at.is_(None),
            unit.is_not(None),
        )
        .group_by(completions.c.number, unit)
    )
    if rollout_id is not None:
        per_user = per_user.where(completions.c.rollout_id == rollout_id)
    inner = per_user.subquery()
    query = sa.select(
        inner.c.number,
        sa.func.count().label("users"),
        sa.func.sum(inner.c.votes).label("votes"),
        sa.func.avg(inner.c.value).label("mean"),
        sa.func.avg(inner.c.value * inner.c.value).label("mean_square"),
    ).group_by(inner.c.number)
    found = {
        row.number: UserVotes(int(row.users), int(row.votes), float(row.mean), float(row.mean_square))
        for row in connection.execute(query)
    }
    return {number: found.get(number, UserVotes()) for number in numbers}


def _smoothed(side: UserVotes) -> tuple[float, float]:
    """Mean and variance with one user who votes 1 and one who votes 0 added."""
    users = side.users + 2
    mean = (side.users * side.mean + 1) / users
    return mean, max((side.users * side.mean_square + 1) / users - mean * mean, 0.0)


def _standard_radius(users: int, alpha: float) -> float:
    """Half the interval's width for unit variance: Theorem 2.2, with the paper's choice of rho for `_TUNED_USERS`."""
    loss = -2 * math.log(alpha)
    rho2 = (loss + math.log(loss + 1)) / _TUNED_USERS
    scaled = users * rho2 + 1
    return math.sqrt(2 * scaled / (users * users * rho2) * math.log(math.sqrt(scaled) / alpha))
