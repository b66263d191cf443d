"""The append-only log of everything that changed what users get: who, what, when, why.

`record` and `bump_routing` run inside the caller's write transaction, so that a change and its event are one commit.
This module does not know what the kinds mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import sqlalchemy as sa

from scion_adapters import tables
from scion_adapters.database import Database, next_value
from scion_adapters.notifications import ROUTING_COUNTER, notify_routing, routing_revision_query
from scion_adapters.records import Event

_NO_DATA: Mapping[str, Any] = MappingProxyType({})


def record(
    connection: sa.Connection,
    clock_value: float,
    kind: str,
    *,
    actor: str,
    reason: str = "",
    adapter: str | None = None,
    number: int | None = None,
    data: Mapping[str, Any] = _NO_DATA,
) -> None:
    """Append one event in the caller's transaction. `kind` is dotted, such as `version.published`."""
    connection.execute(
        sa.insert(tables.events).values(
            at=clock_value,
            kind=kind,
            adapter=adapter,
            number=number,
            actor=actor[:128],
            reason=reason,
            data=dict(data),
        )
    )


def list_events(
    database: Database, *, adapter: str | None = None, after_id: int = 0, limit: int = 100, newest: bool = False
) -> list[Event]:
    """Events with an id above `after_id`, oldest first: the first `limit` of them, or the last ones if `newest`."""
    columns = tables.events.c
    query = sa.select(tables.events).where(columns.id > after_id).limit(limit)
    if adapter is not None:
        query = query.where(columns.adapter == adapter)
    query = query.order_by(columns.id.desc() if newest else columns.id)
    with database.read() as connection:
        events = [Event(**row) for row in connection.execute(query).mappings()]
    return events[::-1] if newest else events


def bump_routing(connection: sa.Connection) -> int:
    """Count the routing revision up, in every transaction that changes what servers should do. Returns the new one."""
    revision = next_value(connection, ROUTING_COUNTER)
    notify_routing(connection, revision)
    return revision


def routing_revision(connection: sa.Connection) -> int:
    """The present routing revision; 0 before the first change."""
    return int(connection.execute(routing_revision_query()).scalar() or 0)
