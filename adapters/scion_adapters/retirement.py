"""Taking versions out of service: retired by a person, quarantined when their files are lost, and back again.

Each is one transaction with its events. Servers follow by themselves: what the routing no longer wants is drained, then
removed from the engine. Files are gc.py's business.
"""

from __future__ import annotations

import sqlalchemy as sa

from scion_adapters import tables, transitions
from scion_adapters.aliases import load_aliases, set_alias_in
from scion_adapters.clock import Clock
from scion_adapters.database import Database, time_in
from scion_adapters.errors import ConflictError
from scion_adapters.records import BASE_NUMBER, CHAMPION, PREVIOUS, Version, VersionRef, VersionState
from scion_adapters.transitions import Cause
from scion_adapters.version_states import set_state_in
from scion_adapters.versions import load_version, lock_adapter

_IN_SERVICE = (VersionState.CANDIDATE, VersionState.ACCEPTED)


def retire(database: Database, ref: VersionRef, *, actor: str, reason: str = "", clock: Clock | None = None) -> Version:
    """Never serve this version again, so that its files may go. Does nothing when it is retired already.

    Raises ConflictError while an alias points at it, a rollout's included.
    """
    with database.write() as connection:
        lock_adapter(connection, ref.adapter)
        version = load_version(connection, ref)
        if version.state is VersionState.RETIRED:
            return version
        held = [alias for alias, number in load_aliases(connection, ref.adapter).items() if number == ref.number]
        rollout = transitions.find_active(connection, ref.adapter)
        if rollout is not None and ref.number in (rollout.number, rollout.stable):
            raise ConflictError(f"{ref} takes part in a rollout: `scion rollout abort {ref.adapter}` first")
        if held:
            raise ConflictError(
                f"{ref} is {', '.join(f'{ref.adapter}@{alias}' for alias in held)}: only a version that no alias "
                "points at can be retired; move or remove them first"
            )
        return set_state_in(connection, ref, VersionState.RETIRED, Cause(actor, reason, time_in(connection, clock)))


def quarantine(database: Database, ref: VersionRef, *, actor: str, reason: str, clock: Clock | None = None) -> Version:
    """Its files are missing or damaged: take it out of all traffic at once. Does nothing when it is not in service.

    Its rollout is aborted; users of a champion go to `previous`, or to the base if there is none; other aliases to it
    are removed. The state it had is in the event, for `reinstate`.
    """
    with database.write() as connection:
        lock_adapter(connection, ref.adapter)
        version = load_version(connection, ref)
        if version.state not in _IN_SERVICE:
            return version
        cause = Cause(actor, reason, time_in(connection, clock))
        rollout = transitions.find_active(connection, ref.adapter)
        if rollout is not None and rollout.number == ref.number:
            transitions.abort(connection, rollout, f"{ref} was quarantined: {reason}", cause)
        aliases = load_aliases(connection, ref.adapter)
        if aliases.get(CHAMPION) == ref.number:
            _set_alias(connection, ref, CHAMPION, aliases.get(PREVIOUS, BASE_NUMBER), cause)
            _set_alias(connection, ref, PREVIOUS, None, cause)
        for alias, number in load_aliases(connection, ref.adapter).items():
            if number == ref.number:
                _set_alias(connection, ref, alias, None, cause)
        return set_state_in(connection, ref, VersionState.QUARANTINED, cause, data={"was": version.state})


def reinstate(database: Database, ref: VersionRef, *, actor: str, reason: str, clock: Clock | None = None) -> Version:
    """A quarantined version's files are back: it is again what it was. No traffic moves; that is for a person."""
    with database.write() as connection:
        lock_adapter(connection, ref.adapter)
        version = load_version(connection, ref)
        if version.state is not VersionState.QUARANTINED:
            return version
        cause = Cause(actor, reason, time_in(connection, clock))
        return set_state_in(connection, ref, _state_before(connection, ref), cause)


def _state_before(connection: sa.Connection, ref: VersionRef) -> VersionState:
    columns = tables.events.c
    query = sa.select(columns.data).where(
        columns.kind == f"version.{VersionState.QUARANTINED}",
        columns.adapter == ref.adapter,
        columns.number == ref.number,
    )
    data = connection.execute(query.order_by(columns.id.desc()).limit(1)).scalar()
    return VersionState((data or {}).get("was", VersionState.CANDIDATE))


def _set_alias(connection: sa.Connection, ref: VersionRef, alias: str, number: int | None, cause: Cause) -> None:
    set_alias_in(connection, ref.adapter, alias, number, clock_value=cause.at, actor=cause.actor, reason=cause.reason)
