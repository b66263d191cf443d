"""Rows of `adapters` and `versions` as records, read in the caller's transaction. Decides and writes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from scion_adapters import tables
from scion_adapters.errors import InvalidInputError, NotFoundError
from scion_adapters.records import BASE_NUMBER, Version, VersionRef, VersionState


def to_version(row: Mapping[Any, Any]) -> Version:
    """A row of `versions` as a record."""
    return Version(**{**row, "state": VersionState(row["state"])})


def is_version(ref: VersionRef) -> sa.ColumnElement[bool]:
    return (tables.versions.c.adapter == ref.adapter) & (tables.versions.c.number == ref.number)


def find_run(connection: sa.Connection, run_id: str) -> Version | None:
    row = connection.execute(sa.select(tables.versions).where(tables.versions.c.run_id == run_id)).mappings().first()
    return to_version(row) if row is not None else None


def require_adapter(connection: sa.Connection, adapter: str) -> None:
    names = list(connection.execute(sa.select(tables.adapters.c.name).order_by(tables.adapters.c.name)).scalars())
    if adapter not in names:
        raise NotFoundError(
            f"no adapter {adapter[:80]!r}: there are {', '.join(names) or 'none'}; add it to [adapters]"
        )


def lock_adapter(connection: sa.Connection, adapter: str) -> None:
    """Hold the adapter's row until the transaction ends: changes of one adapter happen one after the other.

    Take it before reading what the change depends on. SQLite, which has one writer, needs no lock.
    """
    connection.execute(sa.select(tables.adapters.c.name).where(tables.adapters.c.name == adapter).with_for_update())


def load_version(connection: sa.Connection, ref: VersionRef, *, lock: bool = False) -> Version:
    """The version, or NotFoundError; InvalidInputError for number 0, which is the base. `lock` holds its row."""
    query = sa.select(tables.versions).where(is_version(ref))
    row = connection.execute(query.with_for_update() if lock else query).mappings().first()
    if row is not None:
        return to_version(row)
    require_adapter(connection, ref.adapter)
    if ref.number == BASE_NUMBER:
        raise InvalidInputError(
            f"{ref} is the base itself, which is not a version: it cannot be changed", field="version"
        )
    count = connection.execute(
        sa.select(sa.func.count()).select_from(tables.versions).where(tables.versions.c.adapter == ref.adapter)
    ).scalar_one()
    raise NotFoundError(
        f"{ref} does not exist: {ref.adapter} has {count} versions, `scion adapters show {ref.adapter}`"
    )
