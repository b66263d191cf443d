"""What can happen to a rollout, each as one change inside the caller's write transaction, with its aliases and events.

Shared by people's commands (rollouts.py) and the controller (controller.py), which decide *whether* it happens. Every
change is guarded by the `revision` that was read: a change decided on an older state is refused, never merged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from scion_adapters import tables
from scion_adapters.aliases import load_aliases, set_alias_in
from scion_adapters.errors import ConflictError
from scion_adapters.events import bump_routing, record
from scion_adapters.records import BASE_NUMBER, CHALLENGER, CHAMPION, PREVIOUS, Rollout, RolloutState

ARE_RETURNS = tables.rollouts.c.every_s.is_(None) & tables.rollouts.c.after_requests.is_(None)
"""`is_return`, as a condition in SQL."""
_ACTIVE = [state for state in RolloutState if state.is_active]


class StaleRolloutError(ConflictError):
    """Somebody changed the rollout since it was read; nothing was written."""


@dataclass(frozen=True, slots=True)
class Cause:
    """Who does it, why, and when (Unix seconds)."""

    actor: str
    reason: str
    at: float


def to_rollout(row: Mapping[Any, Any]) -> Rollout:
    """A row of `rollouts` as a record."""
    return Rollout(**{**row, "state": RolloutState(row["state"]), "steps": tuple(float(w) for w in row["steps"])})


def find_rollout(connection: sa.Connection, rollout_id: str) -> Rollout | None:
    query = sa.select(tables.rollouts).where(tables.rollouts.c.id == rollout_id)
    row = connection.execute(query).mappings().first()
    return to_rollout(row) if row is not None else None


def find_active(connection: sa.Connection, adapter: str) -> Rollout | None:
    """The adapter's rollout that has not ended, or None."""
    columns = tables.rollouts.c
    query = sa.select(tables.rollouts).where(columns.adapter == adapter, columns.state.in_(_ACTIVE))
    row = connection.execute(query).mappings().first()
    return to_rollout(row) if row is not None else None


def is_return(rollout: Rollout) -> bool:
    """Whether it carries users back to an older version (`scion rollback --to N`). Its step has no length at all,
    which no rollout that `start` makes can have."""
    return rollout.every_s is None and rollout.after_requests is None


def champion_of(connection: sa.Connection, adapter: str) -> int:
    return load_aliases(connection, adapter).get(CHAMPION, BASE_NUMBER)


def start(connection: sa.Connection, rollout: Rollout, cause: Cause) -> None:
    """Insert the rollout and name its version challenger, so that servers load it."""
    row = {name: getattr(rollout, name) for name in Rollout.__dataclass_fields__} | {"steps": list(rollout.steps)}
    connection.execute(sa.insert(tables.rollouts).values(row))
    _set_alias(connection, rollout, CHALLENGER, rollout.number, cause)
    plan: dict[str, Any] = {name: row[name] for name in ("steps", "every_s", "after_requests", "guard", "stable")}
    if rollout.state is RolloutState.UNAPPROVED:
        plan["needs_approval"] = True
    _record(connection, "rollout.started", rollout, cause, plan)
    bump_routing(connection)


def set_step(connection: sa.Connection, rollout: Rollout, step: int, message: str, cause: Cause) -> Rollout:
    """Give the challenger the share of `steps[step]` from now on."""
    changed = _update(connection, rollout, cause.at, step=step, step_started_at=cause.at, message=message)
    data = {"step": step, "weight": changed.weight, "previous_weight": rollout.weight}
    _record(connection, "rollout.step", rollout, cause, data)
    bump_routing(connection)
    return changed


def pause(connection: sa.Connection, rollout: Rollout, message: str, cause: Cause) -> Rollout:
    """Keep the present share until somebody resumes, promotes or aborts."""
    changed = _update(
        connection, rollout, cause.at, state=RolloutState.PAUSED, paused_by=cause.actor[:128], message=message
    )
    _record(connection, "rollout.paused", rollout, cause, {"step": rollout.step, "weight": rollout.weight})
    return changed


def resume(connection: sa.Connection, rollout: Rollout, message: str, cause: Cause) -> Rollout:
    """Go on with the present step, from its beginning."""
    values = {"state": RolloutState.PROGRESSING, "paused_by": None, "step_started_at": cause.at, "message": message}
    changed = _update(connection, rollout, cause.at, **values)
    _record(connection, "rollout.resumed", rollout, cause, {"step": rollout.step, "weight": rollout.weight})
    return changed


def approve(connection: sa.Connection, rollout: Rollout, message: str, cause: Cause) -> Rollout:
    """From now on the controller carries it."""
    values = {"state": RolloutState.PROGRESSING, "step_started_at": cause.at, "message": message}
    changed = _update(connection, rollout, cause.at, **values)
    _record(connection, "rollout.approved", rollout, cause, {"approved_by": cause.actor})
    return changed


def promote(connection: sa.Connection, rollout: Rollout, message: str, cause: Cause) -> Rollout:
    """The challenger becomes the champion, the champion `previous`.

    After a return there is no `previous`: what it removed comes back neither by a rollback nor by a quarantine.
    """
    changed = _update(connection, rollout, cause.at, state=RolloutState.PROMOTED, message=message, paused_by=None)
    previous = None if is_return(rollout) else champion_of(connection, rollout.adapter)
    _set_alias(connection, rollout, CHAMPION, rollout.number, cause)
    _set_alias(connection, rollout, PREVIOUS, previous, cause)
    _set_alias(connection, rollout, CHALLENGER, None, cause)
    _record(connection, "rollout.promoted", rollout, cause, {"champion": rollout.number, "previous": previous})
    bump_routing(connection)
    return changed


def abort(connection: sa.Connection, rollout: Rollout, message: str, cause: Cause) -> Rollout:
    """All traffic goes back to the champion, which never left."""
    changed = _update(connection, rollout, cause.at, state=RolloutState.ABORTED, message=message, paused_by=None)
    _set_alias(connection, rollout, CHALLENGER, None, cause)
    data = {"step": rollout.step, "weight": rollout.weight, "champion": champion_of(connection, rollout.adapter)}
    _record(connection, "rollout.aborted", rollout, cause, data)
    bump_routing(connection)
    return changed


def note(connection: sa.Connection, rollout: Rollout, message: str, at: float) -> Rollout:
    """Say what the rollout waits for. Moves no traffic, hence no event."""
    return _update(connection, rollout, at, message=message)


def _update(connection: sa.Connection, rollout: Rollout, at: float, **values: Any) -> Rollout:
    columns = tables.rollouts.c
    guarded = sa.update(tables.rollouts).where(columns.id == rollout.id, columns.revision == rollout.revision)
    statement = guarded.values(**values, updated_at=at, revision=rollout.revision + 1).returning(tables.rollouts)
    row = connection.execute(statement).mappings().first()
    if row is None:
        raise StaleRolloutError(f"rollout {rollout.id} of {rollout.adapter} was changed by somebody else; look again")
    return to_rollout(row)


def _set_alias(connection: sa.Connection, rollout: Rollout, alias: str, number: int | None, cause: Cause) -> None:
    set_alias_in(
        connection, rollout.adapter, alias, number, clock_value=cause.at, actor=cause.actor, reason=cause.reason
    )


def _record(connection: sa.Connection, kind: str, rollout: Rollout, cause: Cause, data: Mapping[str, Any]) -> None:
    record(
        connection,
        cause.at,
        kind,
        actor=cause.actor,
        reason=cause.reason,
        adapter=rollout.adapter,
        number=rollout.number,
        data={"rollout_id": rollout.id, **data},
    )
