"""What killed processes leave behind: found as findings, each with the step that mends it (`scion doctor --repair`).

Nothing here touches what is in use: leftovers must be older than a grace period, or belong to nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import sqlalchemy as sa

from scion_adapters import tables
from scion_adapters.aliases import EVALUATION_PREFIX
from scion_adapters.artifacts import ArtifactStore
from scion_adapters.database import Database, server_time
from scion_adapters.errors import UnavailableError
from scion_adapters.files import remove_tree
from scion_adapters.gc import GRACE_S
from scion_adapters.records import Version, VersionRef, VersionState, is_step_line
from scion_adapters.registry import Registry
from scion_adapters.replicas import SILENT_S
from scion_adapters.retirement import IN_SERVICE, end_evaluation, is_being_evaluated, quarantine, reinstate
from scion_adapters.steps import abandoned, remove_abandoned
from scion_adapters.versions import to_version

ACTOR = "doctor"
EVALUATION_S = 3600.0
"""A red team's inspection of a candidate sets the same alias as an evaluation, without a lease; by then it is over."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something left over. `mend` removes it, and may be called when it is gone already.

    `needs_person`: no program can do what `remedy` says, and `mend` raises UnavailableError.
    """

    what: str
    remedy: str
    mend: Callable[[], object]
    needs_person: bool = False


def find_leftovers(
    registry: Registry,
    *,
    grace_s: float = GRACE_S,
    silent_s: float = SILENT_S,
    evaluation_s: float = EVALUATION_S,
) -> list[Finding]:
    """Everything that a killed process may have left, and every version whose files are not what its row says.

    Of a store that is not this database's, or not mounted, nothing is said but that.
    """
    database, store = registry.database, registry.store
    with database.read() as connection:
        versions = [to_version(row) for row in connection.execute(sa.select(tables.versions)).mappings()]
    findings = [*_temporaries(store, grace_s), *_dead_servers(database, silent_s), *_dead_runs(registry)]
    findings += _dead_evaluations(database, evaluation_s)
    if store.is_remote:  # only a cache is here
        return findings
    if _is_away(store, versions):
        return [*findings, _away(store)]
    return [*findings, *_strays(store, versions, grace_s), *_removed(store, versions), *_lost(registry, versions)]


def _is_away(store: ArtifactStore, versions: list[Version]) -> bool:
    """Whether versions in service should have a directory here, and not one version has."""
    kept = [version for version in versions if version.files_removed_at is None]
    here = store.stored()
    return any(version.state in IN_SERVICE for version in kept) and not any(v.digest in here for v in kept)


def _away(store: ArtifactStore) -> Finding:
    what = f"{store.root} holds the files of no version of this database"
    remedy = (
        "mount the store, or correct store.url or database.url (if the files are lost for good: "
        "`scion rollback NAME --to 0`, then `scion adapters retire` each version); nobody is quarantined"
    )

    def refuse() -> None:
        raise UnavailableError(f"{what}: {remedy}")

    return Finding(what, remedy, refuse, needs_person=True)


def _temporaries(store: ArtifactStore, grace_s: float) -> Iterator[Finding]:
    """Half-made copies of publishes, fetches and deletions."""
    directory = store.root / "tmp"
    for entry in sorted(directory.iterdir()) if directory.is_dir() else ():
        if time.time() - entry.lstat().st_mtime > grace_s:
            yield Finding(f"{entry} was left by a process that was killed", "delete it", partial(remove_tree, entry))


def _strays(store: ArtifactStore, versions: list[Version], grace_s: float) -> Iterator[Finding]:
    """Published files whose version never got its row."""
    stray = store.stored() - {version.digest for version in versions}
    for digest in sorted(stray - store.younger_than(stray, grace_s)):
        yield Finding(f"artifact {digest} belongs to no version", "delete it", partial(store.remove, digest))


def _removed(store: ArtifactStore, versions: list[Version]) -> Iterator[Finding]:
    """Files that gc had given up when it was killed."""
    given_up = {version.digest for version in versions if version.files_removed_at is not None}
    kept = {version.digest for version in versions if version.files_removed_at is None}
    for digest in sorted((given_up - kept) & store.stored()):
        yield Finding(f"artifact {digest} was to be removed", "delete it", partial(store.remove, digest))


def _lost(registry: Registry, versions: list[Version]) -> Iterator[Finding]:
    """Versions in service without files, and quarantined ones whose files are back."""
    database, store = registry.database, registry.store
    for version in versions:
        ref, has_files = version.ref, store.has(version.digest)
        if version.state in IN_SERVICE and not has_files:
            reason = f"its files are missing or incomplete in {store.root}"
            yield Finding(
                f"{ref}: {reason}",
                "take it out of service",
                partial(quarantine, database, ref, actor=ACTOR, reason=reason),
            )
        elif version.state is VersionState.QUARANTINED and has_files:
            yield Finding(
                f"{ref} is quarantined and its files are back",
                "verify and reinstate it",
                partial(_back, registry, version),
            )


def _back(registry: Registry, version: Version) -> None:
    registry.store.verify(version.digest)
    reinstate(registry.database, version.ref, actor=ACTOR, reason="its files are back")


def _dead_runs(registry: Registry) -> Iterator[Finding]:
    """Adapters that servers hold for the steps of a run that is no more."""
    for line in abandoned(registry):
        what = f"{line}: the run that sampled from these adapters died"
        yield Finding(what, "have servers let go of them", partial(remove_abandoned, registry))


def _dead_evaluations(database: Database, evaluation_s: float) -> Iterator[Finding]:
    """Candidates that servers hold for gates that nobody runs any more."""
    columns = tables.aliases.c
    with database.read() as connection:
        at = server_time(connection)
        query = sa.select(columns.adapter, columns.number).order_by(columns.adapter, columns.number)
        asked = query.where(columns.alias.startswith(EVALUATION_PREFIX), columns.updated_at < at - evaluation_s)
        refs = [
            VersionRef(row.adapter, row.number) for row in connection.execute(asked) if not is_step_line(row.adapter)
        ]
        dead = [ref for ref in refs if not is_being_evaluated(connection, ref, at)]
    for ref in dead:
        reason = "its evaluation died"
        end = partial(end_evaluation, database, ref, actor=ACTOR, reason=reason)
        yield Finding(f"{ref} is kept loaded for its gates: {reason}", "have servers let go of it", end)


def _dead_servers(database: Database, silent_s: float) -> Iterator[Finding]:
    """Ledger rows of servers that ended without saying so."""
    columns = tables.replicas.c
    with database.read() as connection:
        dead = columns.heartbeat_at < server_time(connection) - silent_s
        names = list(connection.execute(sa.select(columns.id).where(dead).order_by(columns.id)).scalars())

    def forget(name: str) -> None:
        with database.write() as connection:
            connection.execute(sa.delete(tables.replicas).where(columns.id == name, dead))

    for name in names:
        yield Finding(f"server {name} died without leaving the ledger", "forget it", partial(forget, name))
