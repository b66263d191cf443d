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
from scion_adapters.tables import runs, snapshot_rows, versions

REWARD = "reward"
REWARD_RUN_METRIC = "reward_run"
"""Where `runs.metrics` has the run that made the reward model which was climbed, or which filtered a teacher."""


@dataclass(frozen=True, slots=True)
class LineageRow:
    """One vote behind a version. `version` is the one whose run used it: the version asked for, or an ancestor."""

    feedback_id: str
    completion_id: str
    user_hash: str | None
    split: str  # "train": learned from; "reward": by the reward model; "heldout", "newest": only used to judge
    version: VersionRef


def feedback_of_version(database: Database, ref: VersionRef, *, inherited: bool = False) -> list[LineageRow]:
    """The votes in the snapshot that `ref` was trained on, and those that taught the reward model of its run.

    With `inherited`, also those of its ancestors. An imported version has none. Raises NotFoundError when the version
    does not exist.
    """
    with database.read() as connection:
        parents = _parents(connection, ref.adapter)
        if ref.number not in parents:
            raise NotFoundError(f"no version {ref}: see `scion adapters show {ref.adapter}`")
        numbers = _with_ancestors(ref.number, parents) if inherited else [ref.number]
        query = (
            sa.select(SOURCES.c.number, SOURCES.c.by_reward, snapshot_rows)
            .select_from(SOURCES.join(snapshot_rows, snapshot_rows.c.snapshot_id == SOURCES.c.snapshot_id))
            .where(SOURCES.c.adapter == ref.adapter, SOURCES.c.number.in_(numbers))
            .where(sa.or_(~SOURCES.c.by_reward, snapshot_rows.c.split == "train"))
            .order_by(SOURCES.c.number.desc(), SOURCES.c.by_reward, snapshot_rows.c.feedback_id)
        )
        return [
            LineageRow(
                row.feedback_id,
                row.completion_id,
                row.user_hash,
                REWARD if row.by_reward else row.split,
                VersionRef(ref.adapter, row.number),
            )
            for row in connection.execute(query)
        ]


def versions_of_user(database: Database, user_hash: str, *, inherited: bool = False) -> list[VersionRef]:
    """The versions that learned from votes of that user, by themselves or by their reward model.

    With `inherited`, also those trained further from them.
    """
    query = (
        sa.select(SOURCES.c.adapter, SOURCES.c.number)
        .distinct()
        .select_from(SOURCES.join(snapshot_rows, snapshot_rows.c.snapshot_id == SOURCES.c.snapshot_id))
        .where(snapshot_rows.c.user_hash == user_hash, snapshot_rows.c.split == "train")
        .order_by(SOURCES.c.adapter, SOURCES.c.number)
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


def _sources() -> sa.Subquery:
    """(adapter, number, snapshot_id, by_reward): the snapshots behind each version. The run that made it names the run
    of its reward model, if it had one.
    """
    maker, reward = runs.alias("maker"), runs.alias("reward")
    own = sa.select(versions.c.adapter, versions.c.number, versions.c.snapshot_id, sa.false().label("by_reward"))
    taught = (
        sa.select(versions.c.adapter, versions.c.number, reward.c.snapshot_id, sa.true())
        .join(maker, maker.c.id == versions.c.run_id)
        .join(reward, reward.c.id == maker.c.metrics[REWARD_RUN_METRIC].as_string())
    )
    return sa.union_all(own, taught).subquery()


SOURCES = _sources()


def _parents(connection: sa.Connection, adapter: str) -> dict[int, int]:
    query = sa.select(versions.c.number, versions.c.parent).where(versions.c.adapter == adapter)
    return {row.number: row.parent for row in connection.execute(query)}


def _with_ancestors(number: int, parents: dict[int, int]) -> Iterable[int]:
    line = []
    while number != BASE_NUMBER and number in parents and number not in line:
        line.append(number)
        number = parents[number]
    return line
