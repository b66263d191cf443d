"""Taking versions out of service: retired by a person, quarantined when their files are lost, and back again.

Each is one transaction with its events. Servers follow by themselves: what the routing no longer wants is drained, then
removed from the engine. Files are gc.py's business.
"""

from __future__ import annotations

import sqlalchemy as sa

from scion_adapters import tables, transitions
from scion_adapters.aliases import evaluation_alias, evaluation_lease, load_aliases, set_alias_in
from scion_adapters.clock import Clock
from scion_adapters.database import Database, time_in
from scion_adapters.errors import ConflictError
from scion_adapters.records import BASE_NUMBER, CHAMPION, PREVIOUS, Rollout, Version, VersionRef, VersionState
from scion_adapters.transitions import Cause
from scion_adapters.version_states import set_state_in
from scion_adapters.versions import load_version, lock_adapter

IN_SERVICE = (VersionState.CANDIDATE, VersionState.ACCEPTED)


def retire(database: Database, ref: VersionRef, *, actor: str, reason: str = "", clock: Clock | None = None) -> Version:
    """Never serve this version again, so that its files may go. Does nothing when it is retired already.

    Raises ConflictError while an alias points at it, a rollout's or a running evaluation's included.
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
        cause = Cause(actor, reason, time_in(connection, clock))
        if (own := evaluation_alias(ref.number)) in held:  # reserved: nobody could remove it by hand
            if is_being_evaluated(connection, ref, cause.at):
                raise ConflictError(f"{ref} is being evaluated: wait until that is done, or end it")
            _set_alias(connection, ref, own, None, cause)
            held.remove(own)
        if held:
            raise ConflictError(
                f"{ref} is {', '.join(f'{ref.adapter}@{alias}' for alias in held)}: only a version that no alias "
                "points at can be retired; move or remove them first"
            )
        return set_state_in(connection, ref, VersionState.RETIRED, cause)


def end_evaluation(database: Database, ref: VersionRef, *, actor: str, reason: str, clock: Clock | None = None) -> None:
    """Servers need not hold `ref` for its gates any more. Does nothing while an evaluation runs."""
    with database.write() as connection:
        lock_adapter(connection, ref.adapter)
        cause = Cause(actor, reason, time_in(connection, clock))
        if not is_being_evaluated(connection, ref, cause.at):
            _set_alias(connection, ref, evaluation_alias(ref.number), None, cause)


def is_being_evaluated(connection: sa.Connection, ref: VersionRef, at: float) -> bool:
    """Whether some process holds the lease that the trainer's evaluations take."""
    columns = tables.leases.c
    held = sa.select(columns.name).where(columns.name == evaluation_lease(ref), columns.expires_at > at)
    return connection.execute(held).first() is not None


def quarantine(database: Database, ref: VersionRef, *, actor: str, reason: str, clock: Clock | None = None) -> Version:
    """Its files are missing or damaged: take it out of all traffic at once. Does nothing when it is not in service.

    Its rollout is aborted, and one whose guard compares with it; users of a champion go to `previous`, or to the base
    if there is none; other aliases to it are removed. The state it had is in the event, for `reinstate`.
    """
    with database.write() as connection:
        lock_adapter(connection, ref.adapter)
        version = load_version(connection, ref)
        if version.state not in IN_SERVICE:
            return version
        cause = Cause(actor, reason, time_in(connection, clock))
        aliases = load_aliases(connection, ref.adapter)
        if aliases.get(CHAMPION) == ref.number:
            _set_alias(connection, ref, CHAMPION, aliases.get(PREVIOUS, BASE_NUMBER), cause)
            _set_alias(connection, ref, PREVIOUS, None, cause)
        rollout = transitions.find_active(connection, ref.adapter)
        if rollout is not None and (message := _why_aborted(rollout, ref, reason)):
            transitions.abort(connection, rollout, message, cause)  # after the champion: its event names the new one
        for alias, number in load_aliases(connection, ref.adapter).items():
            if number == ref.number:
                _set_alias(connection, ref, alias, None, cause)
        return set_state_in(connection, ref, VersionState.QUARANTINED, cause, data={"was": version.state})


def _why_aborted(rollout: Rollout, ref: VersionRef, reason: str) -> str | None:
    """What to say of a rollout that cannot go on without `ref`, or None if it can."""
    if rollout.number == ref.number:
        return f"{ref} was quarantined: {reason}"
    # Nobody gets `stable` any more, so its guard would never again find the challenger worse. Without a guard, as in a
    # return to an older version, nothing is compared, and to stop would undo what a person asked for.
    if rollout.stable == ref.number and rollout.guard:
        again = f"`scion rollout start {ref.adapter}:{rollout.number}` compares with the present champion"
        return f"the champion that the guard compared with, {ref}, was quarantined: {reason}; {again}"
    return None


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
