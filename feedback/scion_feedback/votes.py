"""Which votes count: of the votes of one user about one answer the last one, the others stay as history.

Owns the order of arrival and the `counts` column. A vote without a user belongs to the user of its completion; as votes
may arrive before the completion's record, the two are joined whichever comes last.
"""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa

from scion_adapters.database import Database, insert_ignore, next_value
from scion_adapters.tables import counters, feedback

_COUNTER = "feedback"


def next_sequence(connection: sa.Connection) -> int:
    """The next place in the order of arrival. Votes are written one at a time from here to the end of the transaction.

    On PostgreSQL the counter's row is the lock: who gets a number sees every vote before it. SQLite has one writer.
    """
    return next_value(connection, _COUNTER)


def supersede(
    connection: sa.Connection, *, completion_id: str, choice_index: int, name: str, users: set[str | None], before: int
) -> None:
    """Earlier votes of `users` (None: votes without a known user) about one answer no longer count."""
    clauses = [feedback.c.user_hash == user if user is not None else feedback.c.user_hash.is_(None) for user in users]
    connection.execute(
        sa.update(feedback)
        .where(
            feedback.c.completion_id == completion_id,
            feedback.c.choice_index == choice_index,
            feedback.c.name == name,
            feedback.c.value.is_not(None),
            feedback.c.counts,
            feedback.c.sequence < before,
            sa.or_(*clauses),
        )
        .values(counts=False)
    )


def adopt_early_votes(database: Database, users: Mapping[str, str]) -> None:
    """Give votes without a user, that came before their completion's record, its user. `users`: completion id -> hash.

    Taking the lock of `next_sequence` after the completion was committed leaves no gap: a vote that did not see the
    completion is committed by now, a later vote sees it.
    """
    if not users:
        return
    with database.write() as connection:
        insert_ignore(connection, counters, [{"name": _COUNTER, "value": 0}])
        connection.execute(sa.select(counters.c.value).where(counters.c.name == _COUNTER).with_for_update())
        adopt_in(connection, users)


def adopt_in(connection: sa.Connection, users: Mapping[str, str]) -> None:
    """The same within a transaction that keeps votes out: on SQLite, the one that stores the completions."""
    if not users:
        return
    orphans = connection.execute(
        sa.select(feedback.c.id, feedback.c.completion_id, feedback.c.choice_index, feedback.c.name)
        .where(feedback.c.completion_id.in_(list(users)), feedback.c.user_hash.is_(None))
        .order_by(feedback.c.sequence)
    ).all()
    for row in orphans:
        user = users[row.completion_id]
        connection.execute(sa.update(feedback).where(feedback.c.id == row.id).values(user_hash=user))
    for row in orphans:
        _keep_last(connection, row.completion_id, row.choice_index, row.name, users[row.completion_id])


def _keep_last(connection: sa.Connection, completion_id: str, choice_index: int, name: str, user: str) -> None:
    last = connection.execute(
        sa.select(sa.func.max(feedback.c.sequence)).where(
            feedback.c.completion_id == completion_id,
            feedback.c.choice_index == choice_index,
            feedback.c.name == name,
            feedback.c.user_hash == user,
            feedback.c.value.is_not(None),
            feedback.c.counts,
        )
    ).scalar_one()
    if last is not None:
        supersede(
            connection, completion_id=completion_id, choice_index=choice_index, name=name, users={user}, before=last
        )
