"""Deleting the files of versions that nothing can reach any more. `plan_gc` decides, purely; `collect` carries it out.

Files are shared: an artifact goes only when every version with its digest may go. The rows of versions stay for ever.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from scion_adapters import tables
from scion_adapters.aliases import load_aliases
from scion_adapters.clock import Clock
from scion_adapters.database import time_in
from scion_adapters.events import record
from scion_adapters.records import CHAMPION, Replica, Version, VersionRef, VersionState
from scion_adapters.registry import Registry
from scion_adapters.replicas import SILENT_S, live_in, settle
from scion_adapters.steps import remove_abandoned
from scion_adapters.versions import is_version, to_version

GRACE_S = 3600.0
"""An artifact that was published so recently may be about to get another version."""
_MAY_GO = (VersionState.RETIRED, VersionState.REJECTED)


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of one version's files; `kept_for` is None when they go, else the reason in words."""

    version: Version
    kept_for: str | None


def plan_gc(
    versions: Sequence[Version],
    *,
    aliases: Mapping[str, Mapping[str, int]],
    replicas: Collection[Replica],
    champion_until: Mapping[VersionRef, float],
    young: Collection[str],
    now: float,
    rollback_window_s: float,
) -> list[Fate]:
    """The fate of every version that still has files, by adapter and number.

    `aliases` by adapter; `champion_until`: when a version last stopped being champion; `young`: digests in the grace
    period.
    """
    own: dict[VersionRef, str | None] = {}
    for version in versions:
        ref = version.ref
        held = [alias for alias, number in aliases.get(ref.adapter, {}).items() if number == ref.number]
        users = [r.id for r in replicas if version.lora_id in r.loaded or r.in_flight.get(version.lora_id, 0) > 0]
        left_at = champion_until.get(ref)
        reason: str | None = None
        if version.state not in _MAY_GO:
            reason = f"it is {version.state}"
        elif held:
            reason = f"{ref.adapter}@{held[0]} points at it"
        elif users:
            reason = f"{users[0]} holds it"
        elif left_at is not None and now - left_at < rollback_window_s:
            reason = "it was champion within the rollback window"
        elif version.digest in young:
            reason = "it was published just now"
        own[ref] = reason
    keepers = {v.digest: v.ref for v in versions if own[v.ref] is not None}
    return [
        Fate(v, own[v.ref] or (f"{keepers[v.digest]} has the same files" if v.digest in keepers else None))
        for v in versions
    ]


def collect(
    registry: Registry,
    *,
    rollback_window_s: float,
    grace_s: float = GRACE_S,
    dry_run: bool = False,
    actor: str = "gc",
    clock: Clock | None = None,
) -> list[Fate]:
    """Delete the files that may go, and say what became of each version's.

    What goes is marked in the same transaction that looked, so that nobody can give it traffic in between; then the
    files are deleted. What runs that died had servers load for their steps goes, too. A collection that is killed in
    between leaves files that `scion doctor --repair` removes.
    """
    database, store = registry.database, registry.store
    settle(database)
    if not dry_run:
        remove_abandoned(registry)
    with database.write() as connection:
        query = sa.select(tables.versions).where(tables.versions.c.files_removed_at.is_(None))
        ordered = query.order_by(tables.versions.c.adapter, tables.versions.c.number).with_for_update()
        versions = [to_version(row) for row in connection.execute(ordered).mappings()]
        at = time_in(connection, clock)
        fates = plan_gc(
            versions,
            aliases={name: load_aliases(connection, name) for name in {v.adapter for v in versions}},
            replicas=live_in(connection, time_in(connection, None), SILENT_S),  # heartbeats know no injected clock
            champion_until=_champion_until(connection),
            young=store.younger_than({v.digest for v in versions}, grace_s),
            now=at,
            rollback_window_s=rollback_window_s,
        )
        going = [fate.version for fate in fates if fate.kept_for is None]
        if dry_run or not going:
            return fates
        for version in going:
            connection.execute(sa.update(tables.versions).where(is_version(version.ref)).values(files_removed_at=at))
            record(
                connection, at, "version.files_removed", actor=actor, adapter=version.adapter, number=version.number,
                data={"digest": version.digest, "size_bytes": version.size_bytes},
            )  # fmt: skip
    for digest in sorted({version.digest for version in going}):
        store.remove(digest)
    return fates


def _champion_until(connection: sa.Connection) -> dict[VersionRef, float]:
    """When each version that once was champion last ceased to be."""
    columns = tables.alias_history.c
    query = sa.select(columns.adapter, columns.previous, sa.func.max(columns.at)).where(
        columns.alias == CHAMPION, columns.previous.is_not(None)
    )
    rows = connection.execute(query.group_by(columns.adapter, columns.previous))
    return {VersionRef(adapter, number): float(at) for adapter, number, at in rows}
