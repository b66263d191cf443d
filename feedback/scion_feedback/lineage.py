"""Which votes made a version, and which versions a user's votes went into. Reads tables of others.

A version warm-starts from its parent, so what the parent learned lives on in it: both questions can follow the parents.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import sqlalchemy as sa

from scion_adapters.database import Database
from scion_adapters.errors import NotFoundError
from scion_adapters.records import BASE_NUMBER, VersionRef
from scion_adapters.tables import snapshot_rows, versions


@dataclass(frozen=True, slots=True)
class LineageRow:
    """One vote behind a version. `version` is the one whose run used it: the version asked for, or an ancestor."""

    feedback_id: str
    completion_id: str
    user_hash: str | None
    split: str  # "train": learned from; "heldout", "newest": only used to judge
    version: VersionRef


def feedback_of_version(database: Database, ref: VersionRef, *, inherited: bool = False) -> list[LineageRow]:
    """The votes in the snapshot that `ref` was trained on; with `inherited`, also those of its ancestors.

    An imported version has none. Raises NotFoundError when the version does not exist.
    """
    with database.read() as connection:
        parents = _parents(connection, ref.adapter)
        if ref.number not in parents:
            raise NotFoundError(f"no version {ref}: see `scion adapters show {ref.adapter}`")
        numbers = _with_ancestors(ref.number, parents) if inherited else [ref.number]
        query = (
            sa.select(versions.c.number, snapshot_rows)
            .select_from(versions.join(snapshot_rows, snapshot_rows.c.snapshot_id == versions.c.snapshot_id))
            .where(versions.c.adapter == ref.adapter, versions.c.number.in_(numbers))
            .order_by(versions.c.number.desc(), snapshot_rows.c.feedback_id)
        )
        return [
            LineageRow(
                row.feedback_id, row.completion_id, row.user_hash, row.split, VersionRef(ref.adapter, row.number)
            )
            for row in connection.execute(query)
        ]


def versions_of_user(database: Database, user_hash: str, *, inherited: bool = False) -> list[VersionRef]:
    """The versions that learned from votes of that user; with `inherited`, also those trained further from them."""
    query = (
        sa.select(versions.c.adapter, versions.c.number)
        .distinct()
        .select_from(versions.join(snapshot_rows, snapshot_rows.c.snapshot_id == versions.c.snapshot_id))
        .where(snapshot_rows.c.user_hash == user_hash, snapshot_rows.c.split == "train")
        .order_by(versions.c.adapter, versions.c.number)
    )
    with database.read() as connection:
        direct = [VersionRef(row.adapter, row.number) for row in connection.execute(query)]
        if not inherited:
            return direct
        refs: set[VersionRef] = set()
        for adapter in sorted({ref.adapter for ref in direct}):
            parents = _parents(connection, adapter)
            tainted = {ref.number for ref in direct if ref.adapter == adapter}
            refs |= {VersionRef(adapter, n) for n in parents if not tainted.isdisjoint(_with_ancestors(n, parents))}
    return sorted(refs, key=lambda ref: (ref.adapter, ref.number))


def _parents(connection: sa.Connection, adapter: str) -> dict[int, int]:
    query = sa.select(versions.c.number, versions.c.parent).where(versions.c.adapter == adapter)
    return {row.number: row.parent for row in connection.execute(query)}


def _with_ancestors(number: int, parents: dict[int, int]) -> Iterable[int]:
    line = []
    while number != BASE_NUMBER and number in parents and number not in line:
        line.append(number)
        number = parents[number]
    return line
