"""The replica ledger: which server processes live, and what each of them has loaded.

Servers report about themselves; rollouts, gates and people read. Time is the database's own clock unless one is
injected, so hosts need not agree on theirs. Knows nothing of how a server loads a version.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from scion_adapters.clock import Clock
from scion_adapters.database import Database, time_in
from scion_adapters.errors import UnavailableError
from scion_adapters.records import Replica
from scion_adapters.settings import Settings
from scion_adapters.tables import replicas

FORGET_AFTER_S = 24 * 3600.0
"""Rows of processes that died without saying goodbye are deleted after this long."""
SILENT_S = 900.0
"""A server that was heard of within this time may still hold a version, though it counts as dead for rollouts."""


def heartbeat_ttl_s(settings: Settings) -> float:
    """How long after its last heartbeat a server still counts as live."""
    return 5 * settings.rollout.heartbeat_s


class ReplicaLedger:
    """Reads and writes the table `replicas`."""

    def __init__(self, database: Database, clock: Clock | None = None) -> None:
        self._database = database
        self._clock = clock

    def report(self, replica: Replica) -> None:
        """Insert or replace the row of `replica.id`; its heartbeat is now, whatever it says."""
        row = asdict(replica) | {
            "loaded": sorted(replica.loaded),
            "failed": {str(lora_id): why for lora_id, why in replica.failed.items()},
            "in_flight": {str(lora_id): count for lora_id, count in replica.in_flight.items()},
        }
        with self._database.write() as connection:
            row["heartbeat_at"] = at = time_in(connection, self._clock)
            _count_from(connection, at)
            dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
            insert = dialect.insert(replicas).values(row)
            connection.execute(insert.on_conflict_do_update(index_elements=["id"], set_=row))

    def remove(self, replica_id: str) -> None:
        """Forget a process that ends in good order, and those that died long ago."""
        with self._database.write() as connection:
            long_dead = replicas.c.heartbeat_at < time_in(connection, self._clock) - FORGET_AFTER_S
            connection.execute(sa.delete(replicas).where(sa.or_(replicas.c.id == replica_id, long_dead)))

    def live(self, ttl_s: float) -> list[Replica]:
        """The processes that were heard of within `ttl_s` seconds."""
        settle(self._database, self._clock)
        with self._database.read() as connection:
            return live_in(connection, time_in(connection, self._clock), ttl_s)


def settle(database: Database, clock: Clock | None = None) -> None:
    """Let rows from the future count from now on; for everybody who asks who lives, before the transaction that asks.

    They were written before the clock was set back. Who lives reports again before that runs out, and who is dead
    stops counting, instead of living on for as long as the clock went back, even when no server runs that would report.
    """
    with database.read() as connection:
        newest = connection.execute(sa.select(sa.func.max(replicas.c.heartbeat_at))).scalar()
        at = time_in(connection, clock)
    if newest is not None and newest > at:
        with database.write() as connection:
            _count_from(connection, at)


def _count_from(connection: sa.Connection, at: float) -> None:
    connection.execute(sa.update(replicas).where(replicas.c.heartbeat_at > at).values(heartbeat_at=at))


def live_in(connection: sa.Connection, now_s: float, ttl_s: float) -> list[Replica]:
    """`ReplicaLedger.live` in the caller's transaction; `settle` before it. `now_s`: by the heartbeats' clock."""
    query = sa.select(replicas).where(replicas.c.heartbeat_at >= now_s - ttl_s).order_by(replicas.c.id)
    return [_replica(row) for row in connection.execute(query).mappings()]


def all_loaded(live: Sequence[Replica], lora_id: int) -> bool:
    """Whether every live process holds `lora_id`. False when none is live: nobody can answer with it."""
    return bool(live) and not lacking(live, lora_id)


def lacking(live: Sequence[Replica], lora_id: int) -> dict[str, str]:
    """The live processes that do not hold `lora_id`, each with the reason in words."""
    return {r.id: r.failed.get(lora_id, "still loading") for r in live if lora_id not in r.loaded}


def describe_lacking(lacks: dict[str, str]) -> str:
    """`host-1:4711 (still loading), host-2:4711 (no such file)`, for messages."""
    return ", ".join(f"{replica_id} ({why})" for replica_id, why in lacks.items())


def wait_until_loaded(
    ledger: ReplicaLedger,
    lora_id: int,
    timeout_s: float,
    ttl_s: float,
    poll_s: float = 0.1,
    *,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Replica]:
    """Block until every live process holds `lora_id`; returns them.

    Raises UnavailableError after `timeout_s` seconds, naming the processes that lack it and why, or that none is
    live.
    """
    deadline = monotonic() + timeout_s
    while True:
        live = ledger.live(ttl_s)
        if all_loaded(live, lora_id):
            return live
        if monotonic() >= deadline:
            if not live:
                raise UnavailableError(
                    f"no live server within {timeout_s:g} s: start one with `scion serve` on the same database"
                )
            raise UnavailableError(
                f"adapter with LoRA id {lora_id} is not loaded after {timeout_s:g} s by "
                f"{describe_lacking(lacking(live, lora_id))}"
            )
        sleep(poll_s)


def wait_until_routed(
    ledger: ReplicaLedger,
    revision: int,
    timeout_s: float,
    ttl_s: float,
    poll_s: float = 0.05,
    *,
    monotonic: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Replica]:
    """Block until every live process acts on routing `revision` or a later one; returns them, none if none is live.

    Raises UnavailableError after `timeout_s` seconds, naming those that do not.
    """
    deadline = monotonic() + timeout_s
    while True:
        live = ledger.live(ttl_s)
        behind = [replica.id for replica in live if replica.routing_revision < revision]
        if not behind:
            return live
        if monotonic() >= deadline:
            raise UnavailableError(
                f"routing revision {revision} is not acted on after {timeout_s:g} s by {', '.join(behind)}; "
                "it is recorded, and they follow as soon as they reach the database"
            )
        sleep(poll_s)


def _replica(row: sa.RowMapping) -> Replica:
    values = dict(row) | {
        "loaded": frozenset(int(lora_id) for lora_id in row["loaded"]),
        "failed": {int(lora_id): str(why) for lora_id, why in row["failed"].items()},
        "in_flight": {int(lora_id): int(count) for lora_id, count in row["in_flight"].items()},
    }
    return Replica(**values)
