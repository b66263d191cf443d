"""Movable names such as `chat@champion`: set and removed inside a transaction, each change with history and an event.

One rule holds for everyone who calls: an alias only ever points at an accepted version or the base (0). The exception
are the reserved `candidate-<number>` aliases, which make servers load a candidate for its evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa

from scion_adapters import tables
from scion_adapters.errors import ConflictError, InvalidInputError, NotFoundError
from scion_adapters.events import bump_routing, record
from scion_adapters.records import (
    BASE_NUMBER,
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    VersionRef,
    VersionState,
    check_adapter_name,
)
from scion_adapters.versions import lock_adapter

EVALUATION_PREFIX = "candidate-"
TRAFFIC_ALIASES = (CHAMPION, CHALLENGER, PREVIOUS)
_EVALUATABLE = (VersionState.CANDIDATE, VersionState.ACCEPTED)


@dataclass(frozen=True, slots=True)
class AliasChange:
    """One line of an alias's history. `number` None: removed. `previous` None: it did not exist before."""

    alias: str
    number: int | None
    previous: int | None
    actor: str
    reason: str
    at: float


def evaluation_alias(number: int) -> str:
    """The reserved alias under which version `number` is loaded for its evaluation."""
    return f"{EVALUATION_PREFIX}{number}"


def evaluation_lease(ref: VersionRef) -> str:
    """The name of the lease that an evaluation of `ref` holds while it runs."""
    return f"evaluation:{ref}"


def check_user_alias(alias: str) -> str:
    """The alias itself, or InvalidInputError when it is malformed or reserved."""
    if alias in TRAFFIC_ALIASES:
        raise InvalidInputError(
            f"alias {alias!r} moves traffic and is only changed by `scion rollout` and `scion rollback`", field="alias"
        )
    if alias.startswith(EVALUATION_PREFIX):
        raise InvalidInputError(
            f"alias {alias!r}: names that begin with {EVALUATION_PREFIX!r} are reserved", field="alias"
        )
    try:
        return check_adapter_name(alias)
    except InvalidInputError as error:
        raise InvalidInputError(str(error).replace("adapter name", "alias", 1), field="alias") from error


def load_aliases(connection: sa.Connection, adapter: str) -> dict[str, int]:
    """All aliases of an adapter, the reserved ones included."""
    columns = tables.aliases.c
    rows = connection.execute(
        sa.select(columns.alias, columns.number).where(columns.adapter == adapter).order_by(columns.alias)
    )
    return {row.alias: row.number for row in rows}


def set_alias_in(
    connection: sa.Connection,
    adapter: str,
    alias: str,
    number: int | None,
    *,
    clock_value: float,
    actor: str,
    reason: str = "",
) -> None:
    """Point `alias` at `number`, or remove it (None), in the caller's write transaction. No change, no history.

    Raises NotFoundError or ConflictError when the version does not exist or may not be pointed at.
    """
    lock_adapter(connection, adapter)  # or the version could be rejected between the check and the write
    if number is not None:
        _check_target(connection, adapter, alias, number)
    columns = tables.aliases.c
    this = (columns.adapter == adapter) & (columns.alias == alias)
    previous = connection.execute(sa.select(columns.number).where(this)).scalar()
    if previous == number:
        return
    if number is None:
        connection.execute(sa.delete(tables.aliases).where(this))
    elif previous is None:
        connection.execute(
            sa.insert(tables.aliases).values(adapter=adapter, alias=alias, number=number, updated_at=clock_value)
        )
    else:
        connection.execute(sa.update(tables.aliases).where(this).values(number=number, updated_at=clock_value))
    connection.execute(
        sa.insert(tables.alias_history).values(
            adapter=adapter,
            alias=alias,
            number=number,
            previous=previous,
            actor=actor[:128],
            reason=reason,
            at=clock_value,
        )
    )
    record(
        connection,
        clock_value,
        "alias.removed" if number is None else "alias.set",
        adapter=adapter,
        number=previous if number is None else number,
        actor=actor,
        reason=reason,
        data={"alias": alias, "previous": previous},
    )
    bump_routing(connection)


def load_alias_history(connection: sa.Connection, adapter: str, alias: str | None = None) -> list[AliasChange]:
    """The changes of one alias, or of all of an adapter's, oldest first."""
    columns = tables.alias_history.c
    query = sa.select(columns.alias, columns.number, columns.previous, columns.actor, columns.reason, columns.at)
    query = query.where(columns.adapter == adapter).order_by(columns.id)
    if alias is not None:
        query = query.where(columns.alias == alias)
    return [AliasChange(**row) for row in connection.execute(query).mappings()]


def _check_target(connection: sa.Connection, adapter: str, alias: str, number: int) -> None:
    is_evaluation = alias.startswith(EVALUATION_PREFIX)
    if number == BASE_NUMBER and not is_evaluation:
        return
    columns = tables.versions.c
    query = sa.select(columns.state).where(columns.adapter == adapter, columns.number == number)
    state = connection.execute(query).scalar()
    if state is None:
        raise NotFoundError(f"{adapter}:{number} does not exist: `scion adapters show {adapter}` lists the versions")
    allowed = _EVALUATABLE if is_evaluation else (VersionState.ACCEPTED,)
    if state not in allowed:
        raise ConflictError(
            f"{adapter}@{alias} cannot point at {adapter}:{number}, which is {state}: expected {' or '.join(allowed)}"
        )
