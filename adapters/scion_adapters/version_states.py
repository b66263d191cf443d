"""Changes of a version's state, each with its event, inside the caller's write transaction.

Shared by the registry (accepted, rejected) and by retirement.py (retired, quarantined, reinstated).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from scion_adapters import tables
from scion_adapters.aliases import load_aliases, set_alias_in
from scion_adapters.errors import ConflictError
from scion_adapters.events import bump_routing, record
from scion_adapters.records import CHALLENGER, CHAMPION, Version, VersionRef, VersionState, is_step_line
from scion_adapters.transitions import Cause
from scion_adapters.versions import is_version, load_version, lock_adapter


def accept_in(connection: sa.Connection, ref: VersionRef, cause: Cause, metrics: Mapping[str, Any]) -> Version:
    """The gates passed: the version may be routed to. `metrics` are added to those it has. Does nothing twice."""
    lock_adapter(connection, ref.adapter)
    version = load_version(connection, ref)
    if version.state is VersionState.ACCEPTED:
        return version
    if version.state is not VersionState.CANDIDATE:
        raise ConflictError(f"{ref} is {version.state}: only a candidate can be accepted; publish it again")
    if is_step_line(ref.adapter):
        raise ConflictError(f"{ref} is a step of a run, which ends with it: accept what the run publishes")
    columns = {"metrics": {**version.metrics, **metrics}}
    return set_state_in(connection, ref, VersionState.ACCEPTED, cause, columns=columns)


def reject_in(connection: sa.Connection, ref: VersionRef, cause: Cause) -> Version:
    """Never route to this version: refused while it serves; its other aliases are removed. Does nothing twice."""
    lock_adapter(connection, ref.adapter)
    version = load_version(connection, ref)
    if version.state is VersionState.REJECTED:
        return version
    held = [alias for alias, number in load_aliases(connection, ref.adapter).items() if number == ref.number]
    if serving := [alias for alias in held if alias in (CHAMPION, CHALLENGER)]:
        raise ConflictError(f"{ref} serves users as {serving[0]}: `scion rollback {ref.adapter}` first")
    for alias in held:
        set_alias_in(
            connection, ref.adapter, alias, None, clock_value=cause.at, actor=cause.actor, reason=f"{ref} was rejected"
        )
    return set_state_in(connection, ref, VersionState.REJECTED, cause)


def set_state_in(
    connection: sa.Connection,
    ref: VersionRef,
    state: VersionState,
    cause: Cause,
    *,
    columns: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
) -> Version:
    """Write the state, its reason and `columns`; `version.<state>` is the event, with `data`. Servers hear of it."""
    values = {"state": state, "reason": cause.reason, **(columns or {})}
    connection.execute(sa.update(tables.versions).where(is_version(ref)).values(**values))
    record(
        connection, cause.at, f"version.{state}", actor=cause.actor, reason=cause.reason, adapter=ref.adapter,
        number=ref.number, data=data or {},
    )  # fmt: skip
    bump_routing(connection)
    return load_version(connection, ref)
