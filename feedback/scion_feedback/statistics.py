"""Users' votes in figures, per version: those that count, and none of the red team's.

Draws no conclusions (scion_adapters.analysis does).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa

from scion_adapters.records import RED_TEAM
from scion_adapters.tables import completions, feedback
from scion_feedback.parsing import DEFAULT_NAME

NEUTRAL = 0.5
"""Above it a value is a thumb up, below it a thumb down."""


@dataclass(frozen=True, slots=True)
class VersionStats:
    """One version: its recorded answers and what users said of them."""

    adapter: str
    number: int
    completions: int
    up: int
    down: int
    neutral: int
    users: int  # distinct known users who voted
    comments: int
    corrections: int

    @property
    def share(self) -> float | None:
        """Thumbs up among thumbs, 0..1; None without any."""
        return self.up / (self.up + self.down) if self.up + self.down else None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share}


@dataclass(frozen=True, slots=True)
class FeedbackStats:
    """`unmatched` counts votes whose completion is not recorded (yet); they belong to no version."""

    versions: tuple[VersionStats, ...]
    unmatched: int

    def to_json(self) -> dict[str, Any]:
        return {"versions": [version.to_json() for version in self.versions], "unmatched": self.unmatched}


def read_stats(connection: sa.Connection, adapter: str | None = None) -> FeedbackStats:
    """Votes per version, of one adapter or of all."""
    key = (completions.c.adapter, completions.c.number)
    answers = (
        sa.select(*key, sa.func.count().label("completions"))
        .where(completions.c.route != RED_TEAM)
        .group_by(*key)
        .order_by(*key)
    )
    rating = sa.and_(feedback.c.counts, feedback.c.name == DEFAULT_NAME)
    voter = sa.func.coalesce(feedback.c.user_hash, completions.c.user_hash)
    votes = (
        sa.select(
            *key,
            _num(sa.and_(rating, feedback.c.value > NEUTRAL)).label("up"),
            _num(sa.and_(rating, feedback.c.value < NEUTRAL)).label("down"),
            _num(sa.and_(rating, feedback.c.value == NEUTRAL)).label("neutral"),
            sa.func.count(sa.distinct(sa.case((sa.and_(rating, feedback.c.value.is_not(None)), voter)))).label("users"),
            _num(feedback.c.comment.is_not(None)).label("comments"),
            _num(feedback.c.correction.is_not(None)).label("corrections"),
        )
        .select_from(feedback.join(completions, completions.c.id == feedback.c.completion_id))
        .where(feedback.c.deleted_at.is_(None), feedback.c.source != RED_TEAM)
        .group_by(*key)
    )
    if adapter is not None:
        answers = answers.where(completions.c.adapter == adapter)
        votes = votes.where(completions.c.adapter == adapter)
    unmatched = (
        sa.select(sa.func.count())
        .select_from(feedback.outerjoin(completions, completions.c.id == feedback.c.completion_id))
        .where(completions.c.id.is_(None), feedback.c.deleted_at.is_(None))
    )
    said = {(row["adapter"], row["number"]): row for row in connection.execute(votes).mappings()}
    nothing = dict.fromkeys(("up", "down", "neutral", "users", "comments", "corrections"), 0)
    versions = [
        VersionStats(**{**nothing, **said.get((row["adapter"], row["number"]), {}), **row})
        for row in connection.execute(answers).mappings()
    ]
    return FeedbackStats(tuple(versions), int(connection.execute(unmatched).scalar_one()))


def _num(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
    return sa.func.count(sa.case((condition, 1)))
