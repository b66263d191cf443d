"""One reading of the whole state for people: what `scion status` shows. All of it comes from one transaction."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from scion_adapters import tables
from scion_adapters.aliases import EVALUATION_PREFIX, TRAFFIC_ALIASES, load_aliases
from scion_adapters.clock import Clock
from scion_adapters.database import Database, time_in
from scion_adapters.events import routing_revision
from scion_adapters.keys import key_ring_in
from scion_adapters.records import BASE_NUMBER, CHALLENGER, CHAMPION, PREVIOUS, RED_TEAM, Rollout, RolloutState
from scion_adapters.replicas import heartbeat_ttl_s, live_in, settle
from scion_adapters.settings import Settings

NUM_RUNS = 5
_SERVED = tables.completions.c.route != RED_TEAM
_OF_USERS = tables.feedback.c.source != RED_TEAM


@dataclass(frozen=True, slots=True)
class AdapterStatus:
    """`weight` is the challenger's share, 0..1. `states` counts versions; `aliases` are those that users made."""

    adapter: str
    champion: int
    challenger: int | None
    previous: int | None
    weight: float
    aliases: dict[str, int]
    states: dict[str, int]
    evaluating: list[int]


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """`loaded` and `failed` name versions, not LoRA ids; `slots` is how many versions fit (max_cpu_loras)."""

    id: str
    url: str
    heartbeat_age_s: float
    loaded: list[str]
    slots: int
    failed: dict[str, str]
    in_flight: int
    behind: bool


@dataclass(frozen=True, slots=True)
class Status:
    routing_revision: int
    adapters: list[AdapterStatus]
    replicas: list[ReplicaStatus]
    rollouts: list[Rollout]
    runs: list[dict[str, Any]]
    num_completions: int
    num_feedback: int
    num_counting_feedback: int
    journal_bytes: int | None
    is_open: bool
    num_valid_keys: int


def read_status(database: Database, settings: Settings, clock: Clock | None = None) -> Status:
    """The present state. `journal_bytes` is that of this host, None if there is no journal here.

    `is_open`: servers ask for no API key of ours.
    """
    settle(database, clock)
    with database.read() as connection:
        revision = routing_revision(connection)
        rollouts = _active_rollouts(connection)
        ring = key_ring_in(connection)
        return Status(
            routing_revision=revision,
            adapters=_adapters(connection, {rollout.adapter: rollout for rollout in rollouts}),
            replicas=_replicas(connection, revision, time_in(connection, clock), heartbeat_ttl_s(settings)),
            rollouts=rollouts,
            runs=_runs(connection),
            num_completions=_count(connection, sa.select(tables.completions).where(_SERVED)),
            num_feedback=_count(connection, sa.select(tables.feedback).where(_OF_USERS)),
            num_counting_feedback=_count(
                connection, sa.select(tables.feedback).where(_OF_USERS, tables.feedback.c.counts)
            ),
            journal_bytes=_journal_bytes(settings),
            is_open=ring.is_open,
            num_valid_keys=ring.num_valid,
        )


def _adapters(connection: sa.Connection, rollouts: dict[str, Rollout]) -> list[AdapterStatus]:
    names = connection.execute(sa.select(tables.adapters.c.name).order_by(tables.adapters.c.name)).scalars().all()
    columns = tables.versions.c
    result = []
    for name in names:
        aliases = load_aliases(connection, name)
        states = connection.execute(sa.select(columns.state).where(columns.adapter == name)).scalars()
        rollout = rollouts.get(name)
        result.append(
            AdapterStatus(
                adapter=name,
                champion=aliases.get(CHAMPION, BASE_NUMBER),
                challenger=aliases.get(CHALLENGER),
                previous=aliases.get(PREVIOUS),
                weight=rollout.weight if rollout else 0.0,
                aliases={
                    alias: number
                    for alias, number in aliases.items()
                    if alias not in TRAFFIC_ALIASES and not alias.startswith(EVALUATION_PREFIX)
                },
                states=dict(sorted(Counter(states).items())),
                evaluating=sorted(number for alias, number in aliases.items() if alias.startswith(EVALUATION_PREFIX)),
            )
        )
    return result


def _replicas(connection: sa.Connection, revision: int, now_s: float, ttl_s: float) -> list[ReplicaStatus]:
    columns = tables.versions.c
    rows = connection.execute(sa.select(columns.lora_id, columns.adapter, columns.number))
    names = {row.lora_id: f"{row.adapter}:{row.number}" for row in rows}
    return [
        ReplicaStatus(
            id=replica.id,
            url=replica.url,
            heartbeat_age_s=round(now_s - replica.heartbeat_at, 1),
            loaded=[names.get(lora_id, f"LoRA id {lora_id}") for lora_id in sorted(replica.loaded)],
            slots=replica.max_cpu_loras,
            failed={names.get(lora_id, f"LoRA id {lora_id}"): why for lora_id, why in sorted(replica.failed.items())},
            in_flight=sum(replica.in_flight.values()),
            behind=replica.routing_revision < revision,
        )
        for replica in live_in(connection, now_s, ttl_s)
    ]


def _active_rollouts(connection: sa.Connection) -> list[Rollout]:
    active = [state for state in RolloutState if state.is_active]
    query = sa.select(tables.rollouts).where(tables.rollouts.c.state.in_(active)).order_by(tables.rollouts.c.created_at)
    return [
        Rollout(**{**row, "steps": tuple(row["steps"]), "state": RolloutState(row["state"])})
        for row in connection.execute(query).mappings()
    ]


def _runs(connection: sa.Connection) -> list[dict[str, Any]]:
    columns = tables.runs.c
    shown = (
        columns.id,
        columns.adapter,
        columns.recipe,
        columns.state,
        columns.candidate,
        columns.error,
        columns.created_at,
    )
    query = (
        sa.select(*shown, columns.finished_at).order_by(columns.created_at.desc(), columns.id.desc()).limit(NUM_RUNS)
    )
    return [dict(row) for row in connection.execute(query).mappings()]


def _count(connection: sa.Connection, rows: sa.Select[Any]) -> int:
    return int(connection.execute(sa.select(sa.func.count()).select_from(rows.subquery())).scalar_one())


def _journal_bytes(settings: Settings) -> int | None:
    directory = settings.path(settings.capture.journal)
    if not directory.is_dir():
        return None
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
