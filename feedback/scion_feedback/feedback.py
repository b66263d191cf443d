"""What users said about completions: the `feedback` table. Owns idempotency, deletion and the shape of a row.

A row is durable when `add` returns. Rows never change except for `counts` and the user of an early vote (votes.py);
a deleted row keeps its id, so that a late retry cannot bring it back, and loses what was said. Of a correction it keeps
an empty one, which no vote can have: selection.py learns from it that older corrections stay replaced.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from scion_adapters import clock as clocks
from scion_adapters import events, tables
from scion_adapters.clock import Clock
from scion_adapters.database import Database
from scion_adapters.errors import ConflictError, NotFoundError
from scion_feedback.parsing import FeedbackInput, parse_feedback
from scion_feedback.privacy import UserHasher
from scion_feedback.statistics import FeedbackStats, read_stats
from scion_feedback.votes import next_sequence, supersede

__all__ = ["AddResult", "FeedbackInput", "FeedbackRow", "FeedbackStats", "FeedbackStore", "parse_feedback"]

_EXPORT_PAGE = 500


@dataclass(frozen=True, slots=True)
class FeedbackRow:
    """One vote. `counts` is false once a later vote of the same user about the same answer replaced it."""

    id: str
    sequence: int
    completion_id: str
    choice_index: int
    name: str
    value: float | None
    comment: str | None
    correction: str | None
    user_hash: str | None
    source: str
    metadata: Mapping[str, Any]
    counts: bool
    created_at: float

    def to_json(self) -> dict[str, Any]:
        """The row as HTTP clients see it: nothing about the user."""
        return {
            "id": self.id,
            "object": "feedback",
            "created_at": int(self.created_at),
            "completion_id": self.completion_id,
            "choice_index": self.choice_index,
            "name": self.name,
            "value": self.value,
            "comment": self.comment,
            "correction": self.correction,
            "metadata": dict(self.metadata),
            "counts": self.counts,
        }


@dataclass(frozen=True, slots=True)
class AddResult:
    """`created` is false for a retry; `completion_known` is false while the completion's record is still on its way."""

    row: FeedbackRow
    created: bool
    completion_known: bool


@dataclass(frozen=True, slots=True)
class ExportRow:
    """A vote together with the version that answered; both None while the completion is unknown."""

    row: FeedbackRow
    adapter: str | None
    number: int | None

    def to_json(self) -> dict[str, Any]:
        model = None if self.adapter is None else f"{self.adapter}:{self.number}"
        return {**self.row.to_json(), "user_hash": self.row.user_hash, "source": self.row.source, "model": model}


_table = tables.feedback
_COLUMNS = [_table.c[name] for name in FeedbackRow.__dataclass_fields__]


class FeedbackStore:
    """The votes. Every method opens its own short transaction. `hasher` None: of votes that have no user."""

    def __init__(self, database: Database, hasher: UserHasher | None, clock: Clock = clocks.now) -> None:
        self._database = database
        self._hasher = hasher
        self._clock = clock

    def add(self, feedback: FeedbackInput, *, source: str = "user") -> AddResult:
        """Store a vote durably, or find the row that an earlier attempt made.

        An attempt is recognised by `id` or by `idempotency_key`. Raises ConflictError when either was used with another
        body or for a vote that was deleted since.
        """
        assert feedback.user is None or self._hasher is not None, "a vote with a user needs the hasher"
        user_hash = None if feedback.user is None or self._hasher is None else self._hasher.hash(feedback.user)
        digest = _body_digest(feedback, user_hash)
        with self._database.write() as connection:
            sequence = next_sequence(connection)
            owner = connection.execute(
                sa.select(tables.completions.c.user_hash).where(tables.completions.c.id == feedback.completion_id)
            ).first()
            if (earlier := _earlier_attempt(connection, feedback, digest)) is not None:
                return AddResult(earlier, created=False, completion_known=owner is not None)
            completion_user = None if owner is None else owner.user_hash
            row = FeedbackRow(
                id=feedback.id or clocks.new_id("fb"),
                sequence=sequence,
                completion_id=feedback.completion_id,
                choice_index=feedback.choice_index,
                name=feedback.name,
                value=feedback.value,
                comment=feedback.comment,
                correction=feedback.correction,
                user_hash=user_hash or completion_user,
                source=source,
                metadata=dict(feedback.metadata),
                counts=True,
                created_at=self._clock(),
            )
            if row.value is not None:
                # A vote without a user is one of the completion's user, so it competes with that user's votes.
                users = {row.user_hash, None} if row.user_hash == completion_user else {row.user_hash}
                supersede(
                    connection,
                    completion_id=row.completion_id,
                    choice_index=row.choice_index,
                    name=row.name,
                    users=users,
                    before=sequence,
                )
            values = {column.name: getattr(row, column.name) for column in _COLUMNS}
            connection.execute(
                sa.insert(_table).values(**values, body_digest=digest, idempotency_key=feedback.idempotency_key)
            )
        return AddResult(row, created=True, completion_known=owner is not None)

    def get(self, feedback_id: str) -> FeedbackRow:
        """Raises NotFoundError, also for a deleted row."""
        with self._database.read() as connection:
            row = connection.execute(_select().where(_table.c.id == feedback_id)).mappings().first()
        if row is None:
            raise NotFoundError(f"no feedback {feedback_id!r}: it was never stored, or it was deleted")
        return FeedbackRow(**row)

    def delete(self, feedback_id: str, *, actor: str) -> FeedbackRow:
        """Take a vote back. What was said is removed and an event remembers who did it. Raises NotFoundError.

        An older vote that this one had replaced does not return: whoever un-presses a thumb means "no vote".
        """
        with self._database.write() as connection:
            row = connection.execute(_select().where(_table.c.id == feedback_id).with_for_update()).mappings().first()
            if row is None:
                raise NotFoundError(f"no feedback {feedback_id!r}: it was never stored, or it was deleted")
            at = self._clock()
            trace = None if row["correction"] is None else ""
            connection.execute(
                sa.update(_table)
                .where(_table.c.id == feedback_id)
                .values(deleted_at=at, counts=False, value=None, comment=None, correction=trace, metadata={})
            )
            events.record(connection, at, "feedback.deleted", actor=actor, data={"feedback_id": feedback_id})
        return FeedbackRow(**row)

    def for_completion(self, completion_id: str) -> list[FeedbackRow]:
        """All votes about one completion, replaced ones included, oldest first."""
        query = _select().where(_table.c.completion_id == completion_id).order_by(_table.c.sequence)
        with self._database.read() as connection:
            return [FeedbackRow(**row) for row in connection.execute(query).mappings()]

    def stats(self, adapter: str | None = None) -> FeedbackStats:
        """Votes per version, of one adapter or of all."""
        with self._database.read() as connection:
            return read_stats(connection, adapter)

    def export(self, adapter: str | None = None) -> Iterator[ExportRow]:
        """All votes in order of arrival, read in pages, so that a large export holds no transaction open."""
        completions = tables.completions
        last = 0
        while True:
            query = (
                sa.select(*_COLUMNS, completions.c.adapter, completions.c.number)
                .select_from(_table.outerjoin(completions, completions.c.id == _table.c.completion_id))
                .where(_table.c.deleted_at.is_(None), _table.c.sequence > last)
                .order_by(_table.c.sequence)
                .limit(_EXPORT_PAGE)
            )
            if adapter is not None:
                query = query.where(completions.c.adapter == adapter)
            with self._database.read() as connection:
                page = [dict(row) for row in connection.execute(query).mappings()]
            for row in page:
                version = row.pop("adapter"), row.pop("number")
                yield ExportRow(FeedbackRow(**row), *version)
            if len(page) < _EXPORT_PAGE:
                return
            last = page[-1]["sequence"]


def _select() -> sa.Select[Any]:
    return sa.select(*_COLUMNS).where(_table.c.deleted_at.is_(None))


def _earlier_attempt(connection: sa.Connection, feedback: FeedbackInput, digest: str) -> FeedbackRow | None:
    """The row that the same request made before, or None. Raises ConflictError when id or key mean another vote."""
    clauses = []
    if feedback.id is not None:
        clauses.append(_table.c.id == feedback.id)
    if feedback.idempotency_key is not None:
        clauses.append(_table.c.idempotency_key == feedback.idempotency_key)
    if not clauses:
        return None
    query = sa.select(*_COLUMNS, _table.c.body_digest, _table.c.deleted_at).where(sa.or_(*clauses))
    rows = connection.execute(query).mappings().all()
    if not rows:
        return None
    by_id = feedback.id is not None and any(row["id"] == feedback.id for row in rows)
    used = f"feedback id {feedback.id!r}" if by_id else f"Idempotency-Key {feedback.idempotency_key!r}"
    if len(rows) > 1 or rows[0]["body_digest"] != digest:
        raise ConflictError(f"{used} was used before with another body; send a new one for a new vote")
    row = dict(rows[0])
    if row.pop("deleted_at") is not None:
        raise ConflictError(f"{used} belongs to a vote that was deleted; send a new one to vote again")
    del row["body_digest"]
    return FeedbackRow(**row)


def _body_digest(feedback: FeedbackInput, user_hash: str | None) -> str:
    """What makes two bodies the same. Holds the user's keyed hash: a plain one would give the name away to guessing."""
    body = {
        "completion_id": feedback.completion_id,
        "choice_index": feedback.choice_index,
        "name": feedback.name,
        "value": feedback.value,
        "comment": feedback.comment,
        "correction": feedback.correction,
        "user": user_hash,
        "metadata": dict(feedback.metadata),
        "id": feedback.id,
    }
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
