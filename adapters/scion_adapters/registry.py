"""The registry: adapters, their numbered versions and aliases, as one handle on database and store.

It decides what exists and what may be routed to; what is routed to is decided in rollouts.py. All changes are single
transactions with their events. How a version's state changes is in version_states.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from scion_adapters import tables
from scion_adapters.aliases import (
    AliasChange,
    check_user_alias,
    evaluation_alias,
    load_alias_history,
    load_aliases,
    set_alias_in,
)
from scion_adapters.artifacts import Artifact, ArtifactStore, open_store
from scion_adapters.clock import Clock
from scion_adapters.database import Database, open_database, time_in
from scion_adapters.errors import NotFoundError, RejectedError
from scion_adapters.events import record
from scion_adapters.fingerprint import BaseInfo
from scion_adapters.preflight import AdapterLimits, check_adapter
from scion_adapters.publishing import NewVersion, check_publishable, ensure_adapter_in, insert_version
from scion_adapters.records import (
    BASE_NUMBER,
    CHAMPION,
    Version,
    VersionRef,
    check_adapter_name,
    parse_version_ref,
)
from scion_adapters.settings import Settings
from scion_adapters.transitions import Cause
from scion_adapters.version_states import accept_in, reject_in
from scion_adapters.versions import find_run, load_version, require_adapter, to_version


class Registry:
    """A handle; cheap to share between threads."""

    def __init__(
        self, database: Database, store: ArtifactStore, clock: Clock | None = None, *, base_names: Collection[str] = ()
    ) -> None:
        """`clock` None: the database's own. `base_names`: what the base is served as, and no adapter can be called."""
        self.database = database
        self.store = store
        self._clock = clock
        self._base_names = frozenset(base_names)

    # --- adapters and versions ---

    def ensure_adapter(self, name: str) -> None:
        """Make the adapter if there is none of that name."""
        check_publishable(name, self._base_names)
        with self.database.write() as connection:
            ensure_adapter_in(connection, name, clock_value=time_in(connection, self._clock))

    def adapters(self) -> list[str]:
        with self.database.read() as connection:
            return list(
                connection.execute(sa.select(tables.adapters.c.name).order_by(tables.adapters.c.name)).scalars()
            )

    def publish(
        self,
        adapter: str,
        directory: Path,
        *,
        parent: int,
        base: BaseInfo,
        limits: AdapterLimits,
        actor: str,
        reason: str = "",
        recipe: str | None = None,
        run_id: str | None = None,
        snapshot_id: str | None = None,
        metrics: Mapping[str, Any] | None = None,
        digest: str | None = None,
    ) -> Version:
        """Check `directory`, copy it to the store and give it the next number, as a candidate.

        A `run_id` that published before gets the same version again, so that a resumed run does not publish twice.
        `digest` is what the artifact's must be. A refusal is recorded as `version.refused` and raised as RejectedError.
        """
        try:
            self.check_publishable(adapter)
            if run_id is not None and (published := self._version_of_run(run_id)):
                return published
            if parent != BASE_NUMBER:
                self.version(VersionRef(adapter, parent))
            with self.store.stage(directory) as staged:
                _check_digest(staged.artifact, digest)
                info = check_adapter(staged.path, base, limits)  # the copy: what is checked is what is published
                artifact = self.store.commit(staged)
        except RejectedError as error:
            self.record_refusal(adapter, error, actor=actor, run_id=run_id)
            raise
        new = NewVersion(
            adapter=adapter,
            artifact=artifact,
            info=info,
            parent=parent,
            base_fingerprint=base.fingerprint,
            recipe=recipe,
            run_id=run_id,
            snapshot_id=snapshot_id,
            metrics=metrics or {},
        )
        with self.database.write() as connection:
            at = time_in(connection, self._clock)
            return insert_version(connection, new, clock_value=at, actor=actor, reason=reason)

    def check_publishable(self, adapter: str) -> None:
        """Raises RejectedError when nothing can be published under that name."""
        check_publishable(adapter, self._base_names)

    def record_refusal(self, adapter: str, error: RejectedError, *, actor: str, run_id: str | None = None) -> None:
        """Record that something was not published, and why. `publish` records its own refusals."""
        named = None if error.reason == "invalid_name" else adapter  # the message quotes it; the column is for names
        data = {"check": error.reason, "run_id": run_id}
        with self.database.write() as connection:
            at = time_in(connection, self._clock)
            record(connection, at, "version.refused", adapter=named, actor=actor, reason=str(error), data=data)

    def version(self, ref: VersionRef) -> Version:
        with self.database.read() as connection:
            return load_version(connection, ref)

    def versions(self, adapter: str) -> list[Version]:
        """All versions of an adapter by number, or NotFoundError if there is no such adapter."""
        query = (
            sa.select(tables.versions).where(tables.versions.c.adapter == adapter).order_by(tables.versions.c.number)
        )
        with self.database.read() as connection:
            require_adapter(connection, adapter)
            return [to_version(row) for row in connection.execute(query).mappings()]

    def resolve(self, text: str) -> VersionRef:
        """`chat:7`, `chat@alias` or `chat` (its champion) as a version that exists; number 0 is the base."""
        if ":" in text:
            ref = parse_version_ref(text)
            with self.database.read() as connection:
                if ref.number == BASE_NUMBER:
                    require_adapter(connection, ref.adapter)
                else:
                    load_version(connection, ref)
            return ref
        adapter, sep, alias = text.partition("@")
        check_adapter_name(adapter)
        aliases = self.aliases(adapter)
        if not sep or alias == CHAMPION:
            return VersionRef(adapter, aliases.get(CHAMPION, BASE_NUMBER))
        if alias not in aliases:
            raise NotFoundError(f"{adapter} has no alias {alias[:80]!r}; it has {', '.join(sorted(aliases)) or 'none'}")
        return VersionRef(adapter, aliases[alias])

    def accept(self, ref: VersionRef, *, actor: str, reason: str, metrics: Mapping[str, Any] | None = None) -> Version:
        """The gates passed: the version may be routed to. `metrics` are added to those it has."""
        with self.database.write() as connection:
            return accept_in(connection, ref, self._cause(connection, actor, reason), metrics or {})

    def reject(self, ref: VersionRef, *, actor: str, reason: str) -> Version:
        """Never route to this version: refused while it serves; its other aliases are removed."""
        with self.database.write() as connection:
            return reject_in(connection, ref, self._cause(connection, actor, reason))

    # --- aliases ---

    def aliases(self, adapter: str) -> dict[str, int]:
        """All aliases, the reserved ones included, or NotFoundError if there is no such adapter."""
        with self.database.read() as connection:
            require_adapter(connection, adapter)
            return load_aliases(connection, adapter)

    def alias_history(self, adapter: str, alias: str | None = None) -> list[AliasChange]:
        with self.database.read() as connection:
            return load_alias_history(connection, adapter, alias)

    def set_alias(self, adapter: str, alias: str, number: int, *, actor: str, reason: str = "") -> None:
        """Point a user's alias at an accepted version (or 0, the base)."""
        check_user_alias(alias)
        with self.database.write() as connection:
            require_adapter(connection, adapter)
            self._set_alias(connection, VersionRef(adapter, number), alias, number, actor=actor, reason=reason)

    def remove_alias(self, adapter: str, alias: str, *, actor: str, reason: str = "") -> None:
        check_user_alias(alias)
        with self.database.write() as connection:
            if alias not in load_aliases(connection, adapter):
                raise NotFoundError(f"{adapter} has no alias {alias!r}")
            self._set_alias(connection, VersionRef(adapter, 0), alias, None, actor=actor, reason=reason)

    def request_evaluation(self, ref: VersionRef, *, actor: str = "gates") -> None:
        """Ask the servers to load a version that is not rejected, for its gates only."""
        with self.database.write() as connection:
            self._set_alias(connection, ref, evaluation_alias(ref.number), ref.number, actor=actor, reason="evaluation")

    def finish_evaluation(self, ref: VersionRef, *, actor: str = "gates") -> None:
        """The evaluation is over; nothing happens if there was none."""
        with self.database.write() as connection:
            self._set_alias(
                connection, ref, evaluation_alias(ref.number), None, actor=actor, reason="evaluation finished"
            )

    # --- inside a transaction ---

    def _version_of_run(self, run_id: str) -> Version | None:
        with self.database.read() as connection:
            return find_run(connection, run_id)

    def _cause(self, connection: sa.Connection, actor: str, reason: str) -> Cause:
        return Cause(actor, reason, time_in(connection, self._clock))

    def _set_alias(
        self, connection: sa.Connection, ref: VersionRef, alias: str, number: int | None, *, actor: str, reason: str
    ) -> None:
        at = time_in(connection, self._clock)
        set_alias_in(connection, ref.adapter, alias, number, clock_value=at, actor=actor, reason=reason)


def _check_digest(artifact: Artifact, expected: str | None) -> None:
    if expected is not None and expected != artifact.digest:
        raise RejectedError(
            f"the files' digest is {artifact.digest}, expected {expected[:80]!a}: they were changed on the way",
            reason="digest_mismatch",
        )


def open_registry(
    settings: Settings, database: Database | None = None, *, base_names: Collection[str] = ()
) -> Registry:
    """The configured registry; the configured adapters exist afterwards. `base_names`: more names of the base."""
    names = {settings.base.served_name, *base_names}
    registry = Registry(database or open_database(settings), open_store(settings), base_names=names)
    for name in sorted(set(settings.adapters) - set(registry.adapters())):
        registry.ensure_adapter(name)
    return registry


def limits_of(settings: Settings) -> AdapterLimits:
    """What the configured servers can take."""
    return AdapterLimits(max_rank=settings.server.max_lora_rank, target_modules=settings.server.target_modules)
