"""Adapters of a run's steps: what servers hold only so that the run can sample from it, while it trains.

They lie in a line of their own with a reserved name, as candidates: checked like every adapter, loaded under a fresh
name and LoRA id, asked only with their key, and never accepted, so never routed. When the run ends, or by `gc` when it
died, line, rows and files are gone. Knows nothing of how a server loads or of what is sampled.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import sqlalchemy as sa

from scion_adapters import tables
from scion_adapters.aliases import evaluation_alias
from scion_adapters.clock import Clock, new_id, now
from scion_adapters.database import time_in
from scion_adapters.errors import UnavailableError
from scion_adapters.events import bump_routing, record
from scion_adapters.fingerprint import BaseInfo
from scion_adapters.leases import HeldLease, current_holder
from scion_adapters.preflight import AdapterLimits, check_adapter
from scion_adapters.publishing import NewVersion, ensure_adapter_in, insert_version
from scion_adapters.records import BASE_NUMBER, STEPS_PREFIX, Version, is_step_line
from scion_adapters.registry import Registry
from scion_adapters.replicas import SILENT_S, live_in
from scion_adapters.versions import is_version, to_version

LEASE_TTL_S = 60.0
ROLLOUT_PRIORITY = 100
"""Users' requests have priority 0; vLLM serves the lower number first, and ours leave rollouts out beside users."""


class StepLine:
    """The line of one run, from entering to leaving the `with` block. One thread uses it."""

    def __init__(
        self, registry: Registry, *, base: BaseInfo, limits: AdapterLimits, actor: str, clock: Clock = now
    ) -> None:
        self.name = new_id(STEPS_PREFIX.rstrip("-"))
        self._registry = registry
        self._base = base
        self._limits = limits
        self._actor = actor
        self._clock = clock
        self._lease = HeldLease(registry.database, _lease_name(self.name), actor[:128], ttl_s=LEASE_TTL_S)

    def __enter__(self) -> StepLine:
        remove_abandoned(self._registry)
        self._lease.__enter__()  # first: a line without a lease belongs to nobody
        with self._registry.database.write() as connection:
            at = self._clock()
            ensure_adapter_in(connection, self.name, clock_value=at)
            record(connection, at, "steps.began", actor=self._actor, adapter=self.name)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, directory: Path) -> Version:
        """Ask servers to load the adapter in `directory`, under a name and an id that never were and never will be.

        Raises RejectedError when it fails a check that every version must pass: NaN in one would spoil users' answers;
        UnavailableError when this process stood still so long that others took it for dead.
        """
        if self._lease.lost.is_set():
            raise UnavailableError(f"{self.name}: its lease was lost (database gone, or this process was stopped)")
        store, database = self._registry.store, self._registry.database
        with store.stage(directory) as staged:
            info = check_adapter(staged.path, self._base, self._limits)
            artifact = store.commit(staged)
        new = NewVersion(
            adapter=self.name,
            artifact=artifact,
            info=info,
            parent=BASE_NUMBER,
            base_fingerprint=self._base.fingerprint,
            recipe=None,
            run_id=None,
            snapshot_id=None,
            metrics={},
        )
        with database.write() as connection:
            at = self._clock()
            version = insert_version(
                connection, new, clock_value=at, actor=self._actor, reason="a step of a run", is_recorded=False
            )
            # Not set_alias_in: a run has hundreds of steps, and neither history nor events are for them.
            connection.execute(
                sa.insert(tables.aliases).values(
                    adapter=self.name, alias=evaluation_alias(version.number), number=version.number, updated_at=at
                )
            )
            bump_routing(connection)
        return version

    def drop(self, version: Version) -> None:
        """Nobody asks `version` any more: servers let go of it, and then its files go."""
        with self._registry.database.write() as connection:
            columns = tables.aliases.c
            alias = evaluation_alias(version.number)
            connection.execute(sa.delete(tables.aliases).where(columns.adapter == self.name, columns.alias == alias))
            bump_routing(connection)
        sweep(self._registry, self.name)

    def close(
        self,
        timeout_s: float = 20.0,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> bool:
        """Take everything back; waits for servers to let go. False when some did not: gc does the rest."""
        _drop_all(self._registry, self.name)
        deadline = monotonic() + timeout_s
        while not (is_gone := sweep(self._registry, self.name, is_ending=True)) and monotonic() < deadline:
            sleep(0.05)
        self.abandon()
        return is_gone

    def abandon(self) -> None:
        """Leave everything as it is: for gc, or because servers and registry end anyway."""
        self._lease.__exit__(None, None, None)


def abandoned(registry: Registry) -> list[str]:
    """The lines whose runs died without ending them."""
    names = [name for name in registry.adapters() if is_step_line(name)]
    return [name for name in names if current_holder(registry.database, _lease_name(name)) is None]


def remove_abandoned(registry: Registry) -> list[str]:
    """End the lines whose runs died; returns those that are gone. What a server still holds stays for the next time."""
    gone = []
    for name in abandoned(registry):
        _drop_all(registry, name)
        if sweep(registry, name, is_ending=True):
            gone.append(name)
    return gone


def sweep(registry: Registry, line: str, *, is_ending: bool = False) -> bool:
    """Forget the dropped adapters of `line` that no server holds, with their files.

    `is_ending`: the line itself goes when nothing is left in it. Returns whether it is gone.
    """
    versions, columns = tables.versions, tables.versions.c
    with registry.database.write() as connection:
        held = _held(connection)
        wanted = sa.select(tables.aliases.c.number).where(tables.aliases.c.adapter == line)
        query = sa.select(versions).where(columns.adapter == line, columns.number.not_in(wanted))
        dropped = [to_version(row) for row in connection.execute(query).mappings()]
        going = [version for version in dropped if version.lora_id not in held]
        for version in going:
            connection.execute(sa.delete(versions).where(is_version(version.ref)))
        digests = {version.digest for version in going}
        shared = sa.select(columns.digest).where(columns.digest.in_(digests))
        digests -= set(connection.execute(shared).scalars())
        left = connection.execute(sa.select(columns.number).where(columns.adapter == line).limit(1)).first()
        if is_gone := is_ending and left is None:
            if connection.execute(sa.delete(tables.adapters).where(tables.adapters.c.name == line)).rowcount:
                record(connection, now(), "steps.ended", actor="steps", adapter=line)
                bump_routing(connection)
            connection.execute(sa.delete(tables.counters).where(tables.counters.c.name == f"number:{line}"))
    for digest in sorted(digests):
        registry.store.remove(digest)
    return is_gone


def _held(connection: sa.Connection) -> set[int]:
    """The LoRA ids that some server holds, or may hold."""
    replicas = live_in(connection, time_in(connection, None), SILENT_S)
    return {lora_id for replica in replicas for lora_id in (*replica.loaded, *replica.in_flight)}


def _drop_all(registry: Registry, line: str) -> None:
    with registry.database.write() as connection:
        connection.execute(sa.delete(tables.aliases).where(tables.aliases.c.adapter == line))
        bump_routing(connection)


def _lease_name(line: str) -> str:
    return f"steps:{line}"
