"""Rows that rollout tests start from: versions, servers, answers and votes, without files and without vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Any

import sqlalchemy as sa

from scion_adapters import tables
from scion_adapters.database import Database, insert_ignore
from scion_adapters.events import list_events
from scion_adapters.records import Replica, VersionState
from scion_adapters.replicas import ReplicaLedger

START = 1_000_000.0
_ids = count(1)


@dataclass(slots=True)
class FakeClock:
    """A clock that stands still until the test moves it."""

    at: float = START

    def __call__(self) -> float:
        return self.at

    def advance(self, seconds: float) -> None:
        self.at += seconds


def lora_id_of(adapter: str, number: int) -> int:
    """The LoRA id that `add_version` gives; unlike numbers, it differs between adapters."""
    return sum(map(ord, adapter)) * 1000 + number


def add_version(
    database: Database,
    number: int,
    *,
    adapter: str = "chat",
    state: VersionState = VersionState.ACCEPTED,
    reason: str | None = None,
) -> int:
    """A row of `versions`, and of `adapters` if needed. Returns its LoRA id."""
    lora_id = lora_id_of(adapter, number)
    with database.write() as connection:
        insert_ignore(connection, tables.adapters, [{"name": adapter, "created_at": START}])
        row = {
            "adapter": adapter,
            "number": number,
            "lora_id": lora_id,
            "digest": f"sha256:{lora_id:064x}",
            "state": state,
            "parent": 0,
            "base_fingerprint": "sha256:" + "0" * 64,
            "metrics": {},
            "rank": 4,
            "size_bytes": 1,
            "evaluation_key": f"key-{lora_id}",
            "reason": reason,
            "created_at": START,
            "created_by": "test",
        }
        connection.execute(sa.insert(tables.versions).values(row))
    return lora_id


def make_replica(
    name: str = "host:1",
    *,
    loaded: frozenset[int] | set[int] = frozenset(),
    failed: dict[int, str] | None = None,
    heartbeat_at: float = START,
    max_loras: int = 4,
    max_cpu_loras: int = 8,
    routing_revision: int = 0,
) -> Replica:
    return Replica(
        id=name,
        host="host",
        pid=1,
        url="http://127.0.0.1:8000",
        started_at=START,
        heartbeat_at=heartbeat_at,
        max_loras=max_loras,
        max_cpu_loras=max_cpu_loras,
        max_lora_rank=16,
        loaded=frozenset(loaded),
        failed=failed or {},
        in_flight={},
        routing_revision=routing_revision,
        base_fingerprint="sha256:" + "0" * 64,
    )


def report(database: Database, replica: Replica) -> None:
    """As if it reported at its `heartbeat_at`."""
    ReplicaLedger(database, lambda: replica.heartbeat_at).report(replica)


def add_completion(database: Database, number: int, **values: Any) -> None:
    """`write_completion` in a transaction of its own."""
    with database.write() as connection:
        write_completion(connection, number, **values)


def write_completion(
    connection: sa.Connection,
    number: int,
    *,
    rollout_id: str | None,
    at: float,
    adapter: str = "chat",
    user: str | None = None,
    vote: float | None = None,
    name: str = "rating",
    counts: bool = True,
    deleted: bool = False,
    conversation: str | None = None,
) -> None:
    """An answer, and the vote on it unless `vote` is None."""
    key = f"c{next(_ids)}"
    completion = {
        "id": key,
        "record_id": key,
        "adapter": adapter,
        "number": number,
        "probability": 0.5,
        "rollout_id": rollout_id,
        "requested_model": adapter,
        "route": "chat",
        "user_hash": user,
        "conversation": conversation,
        "request": {},
        "choices": [],
        "latency_ms": 1.0,
        "stream": False,
        "created_at": at,
    }
    connection.execute(sa.insert(tables.completions).values(completion))
    if vote is None:
        return
    row = {
        "id": f"f-{key}",
        "sequence": next(_ids),
        "body_digest": "0" * 64,
        "completion_id": key,
        "choice_index": 0,
        "name": name,
        "value": vote,
        "user_hash": user,
        "source": "user",
        "metadata": {},
        "counts": counts,
        "created_at": at,
        "deleted_at": at if deleted else None,
    }
    connection.execute(sa.insert(tables.feedback).values(row))


def event_kinds(database: Database, adapter: str | None = "chat") -> list[str]:
    """The kinds of all events, oldest first; `alias.set champion` names the alias as well."""
    return [
        f"{event.kind} {event.data['alias']}" if event.kind.startswith("alias.") else event.kind
        for event in list_events(database, adapter=adapter, limit=1000)
    ]
