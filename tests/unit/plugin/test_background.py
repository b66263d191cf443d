from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from prometheus_client import CollectorRegistry

from scion_adapters import controller, tables
from scion_adapters.clock import now
from scion_adapters.database import Database
from scion_adapters.errors import UnavailableError
from scion_adapters.events import bump_routing, list_events
from scion_adapters.keys import Scope, create_key, revoke_key
from scion_adapters.leases import current_holder
from scion_adapters.records import Replica, VersionState
from scion_adapters.replicas import ReplicaLedger
from scion_adapters.routing import Routing
from scion_adapters.sections.serving import RolloutSection
from tests.helpers.databases import sqlite_database
from tests.helpers.engine import FakeStore, FakeTable
from tests.helpers.waiting import until
from vllm_scion import background as background_module
from vllm_scion.authority import Refusal
from vllm_scion.background import CONTROLLER_LEASE, Background, Identity
from vllm_scion.loader import Loader
from vllm_scion.metrics import Metrics
from vllm_scion.serving import Flight, Serving

FAST = RolloutSection(poll_interval_s=0.01, heartbeat_s=0.05)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = sqlite_database(tmp_path)
    yield database
    database.dispose()


def add_version(database: Database, number: int, lora_id: int) -> None:
    """An accepted version, without files."""
    with database.write() as connection:
        if connection.execute(sa.select(tables.adapters)).first() is None:
            connection.execute(sa.insert(tables.adapters).values(name="chat", created_at=0.0))
        connection.execute(
            sa.insert(tables.versions).values(
                adapter="chat",
                number=number,
                lora_id=lora_id,
                digest=f"sha256:{number}",
                state=VersionState.ACCEPTED,
                parent=0,
                base_fingerprint="sha256:base",
                metrics={},
                rank=4,
                size_bytes=1,
                evaluation_key="key",
                created_at=0.0,
                created_by="test",
            )
        )


def set_champion(database: Database, number: int) -> None:
    with database.write() as connection:
        connection.execute(sa.delete(tables.aliases))
        connection.execute(
            sa.insert(tables.aliases).values(adapter="chat", alias="champion", number=number, updated_at=0.0)
        )
        bump_routing(connection)


def start_rollout(database: Database, number: int) -> None:
    with database.write() as connection:
        connection.execute(
            sa.insert(tables.rollouts).values(
                id="rollout-1",
                adapter="chat",
                number=number,
                stable=1,
                state="progressing",
                steps=[1.0],
                step=-1,
                guard=False,
                step_started_at=0.0,
                message="",
                actor="test",
                created_at=0.0,
                updated_at=0.0,
                revision=0,
            )
        )
        bump_routing(connection)


def make_background(
    database: Database, settings: RolloutSection = FAST, *, engine: str = "host:1", is_engine_shared: bool = False
) -> Background:
    async def run(work: Callable[[], str]) -> str:
        return work()

    metrics = Metrics(CollectorRegistry())
    identity = Identity("http://x", 4, 8, 16, "sha256:base", now(), engine, is_engine_shared)
    loader = Loader(FakeTable(), FakeStore(), Serving(), metrics, run, slots=8)
    return Background(database, ReplicaLedger(database), loader, metrics, settings, identity)


@asynccontextmanager
async def running(database: Database, settings: RolloutSection = FAST, **options: Any) -> AsyncIterator[Background]:
    background = make_background(database, settings, **options)
    await background.start()
    try:
        yield background
    finally:
        await background.close()


def in_ledger(database: Database) -> list[Replica]:
    return ReplicaLedger(database).live(60.0)


async def test_start_returns_with_the_champion_loaded_and_reported(database: Database) -> None:
    add_version(database, 1, 11)
    set_champion(database, 1)
    async with running(database) as background:
        assert background.loader.serving.published.resident == {11}
        (replica,) = in_ledger(database)
        assert replica.loaded == {11}
        assert replica.routing_revision == background.loader.routing.revision == 1
    assert in_ledger(database) == []  # a server that stopped in good order does not hold up a rollout


async def test_a_new_routing_is_followed_loaded_and_reported(database: Database) -> None:
    add_version(database, 1, 11)
    set_champion(database, 1)
    async with running(database) as background:
        add_version(database, 2, 12)
        set_champion(database, 2)
        await until(lambda: background.loader.serving.published.resident == {12})
        await until(lambda: in_ledger(database)[0].loaded == {12})
        assert in_ledger(database)[0].routing_revision == 2


async def test_a_failed_load_is_in_the_ledger_with_its_reason(database: Database) -> None:
    add_version(database, 1, 11)
    set_champion(database, 1)
    background = make_background(database)
    background.loader.table.fail = {11}  # type: ignore[attr-defined]
    await background.start()
    try:
        assert "the engine says no" in in_ledger(database)[0].failed[11]
    finally:
        await background.close()


class FlakyDatabase(Database):
    """A database that can be gone."""

    gone = False

    def read(self) -> Any:
        if self.gone:
            raise UnavailableError("the database does not answer")
        return super().read()

    def write(self) -> Any:
        if self.gone:
            raise UnavailableError("the database does not answer")
        return super().write()


async def test_the_last_routing_outlives_the_database(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="vllm_scion")
    add_version(database, 1, 11)
    add_version(database, 2, 12)
    set_champion(database, 1)
    flaky = FlakyDatabase(database.url)
    async with running(flaky) as background:
        errors = background.metrics["scion_database_errors_total"].labels("routing")
        flaky.gone = True
        await until(lambda: errors._value.get() >= 3)
        assert background.loader.serving.published.resident == {11}
        logged = [r for r in caplog.records if r.message.startswith("routing:") and r.levelname == "ERROR"]
        assert len(logged) == 1  # said once, not at every poll

        set_champion(database, 2)
        flaky.gone = False
        await until(lambda: background.loader.serving.published.resident == {12})
        await until(lambda: any("works again" in r.message for r in caplog.records))
    flaky.dispose()


async def test_the_last_keys_outlive_the_database(database: Database) -> None:
    key, plain = create_key(database, "shop", Scope.CHAT, actor="me")
    flaky = FlakyDatabase(database.url)
    async with running(flaky) as background:
        keeper = background.gatekeeper
        errors = background.metrics["scion_database_errors_total"].labels("refusals")
        flaky.gone = True
        background.refusals.add(Refusal("unknown", "GET", "/v1/models", "10.0.0.1", None))
        await until(lambda: errors._value.get() == 1)
        assert keeper.ring.check(plain) == key
        revoke_key(database, key.id, actor="me")
        flaky.gone = False
        await until(lambda: keeper.ring.check(plain) is None)
        assert not keeper.ring.is_open
        background.refusals.add(Refusal("revoked", "GET", "/v1/models", "10.0.0.1", key.id))
        await until(lambda: len(refused(database)) == 2)
        background.refusals.add(Refusal("revoked", "GET", "/v1/models", "10.0.0.1", key.id))
    assert refused(database) == [("unknown", 1), ("revoked", 1), ("revoked", 1)], "late, but all of them"
    flaky.dispose()


def refused(database: Database) -> list[tuple[str, int]]:
    events = list_events(database, limit=1000)
    return [(event.data["reason"], event.data["count"]) for event in events if event.kind == "access.refused"]


async def test_without_a_database_there_is_no_start(database: Database) -> None:
    flaky = FlakyDatabase(database.url)
    flaky.gone = True
    with pytest.raises(UnavailableError):
        await make_background(flaky).start()
    flaky.dispose()


async def test_one_of_two_servers_looks_after_rollouts_and_the_other_takes_over(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks: list[float] = []
    monkeypatch.setattr(controller, "tick", lambda *_, heartbeat_ttl_s, **__: ticks.append(heartbeat_ttl_s))
    add_version(database, 1, 11)
    add_version(database, 2, 12)
    set_champion(database, 1)
    async with running(database) as first:
        await until(lambda: first.metrics["scion_controller_lease_held"]._value.get() == 0)
        assert current_holder(database, CONTROLLER_LEASE) is None  # no rollout, no lease, no writes
        start_rollout(database, 2)
        await until(lambda: ticks)
        await until(lambda: first.metrics["scion_rollout_active"].labels("chat")._value.get() == 1)
        assert current_holder(database, CONTROLLER_LEASE) == first.identity.id
        async with running(database) as second:
            await until(lambda: second._lease_due > 0.0)  # it asked, in vain
            assert not second._holds_lease
            await first.close()
            await until(lambda: current_holder(database, CONTROLLER_LEASE) == second.identity.id)
    assert set(ticks) == {FAST.heartbeat_s * 5}


async def test_a_loop_that_stumbles_goes_on(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add_version(database, 1, 11)
    set_champion(database, 1)
    monkeypatch.setattr(background_module, "STUMBLE_PAUSE_S", 0.01)
    mistakes = iter([RuntimeError("a mistake of ours")])
    follow = Loader.follow

    def stumble_once(self: Loader, routing: Routing) -> None:
        for mistake in mistakes:
            raise mistake
        follow(self, routing)

    async with running(database) as background:
        monkeypatch.setattr(Loader, "follow", stumble_once)
        set_champion(database, 0)
        await until(lambda: background.loader.routing.revision == 2)
    assert any("stumbled" in record.message for record in caplog.records)


async def test_a_change_is_heard_of_between_two_polls(database: Database) -> None:
    add_version(database, 1, 11)
    async with running(database, RolloutSection(poll_interval_s=3600.0, heartbeat_s=3600.0)) as background:
        await until(lambda: background.loader.routing.revision == 0)
        set_champion(database, 1)
        await until(lambda: background.loader.serving.published.resident == {11})
        await until(lambda: in_ledger(database)[0].routing_revision == 1)


async def test_processes_in_front_of_one_engine_leave_it_what_another_uses(database: Database) -> None:
    add_version(database, 1, 11)
    set_champion(database, 1)
    shared: dict[str, Any] = {"engine": "host:1", "is_engine_shared": True}
    async with running(database, **shared) as first, running(database, **shared) as second:
        flight = Flight(second.loader.serving.in_flight, 11)
        set_champion(database, 0)
        await until(lambda: first.loader.leaving.keys() == {11})  # gone from the first process, not from the engine
        assert second.loader.loaded.keys() == {11}
        flight.land()
        await until(lambda: first.loader.is_settled and second.loader.is_settled)
        removals = [background.loader.table.calls.count("unload 11") for background in (first, second)]
        assert all(count <= 1 for count in removals)
        assert sum(removals) >= 1


async def test_a_process_that_died_with_a_version_loaded_blocks_no_slot_for_ever(database: Database) -> None:
    add_version(database, 1, 11)
    set_champion(database, 1)
    async with running(database, engine="host:1", is_engine_shared=True) as background:
        ReplicaLedger(database).report(replace(background.replica(), id="dead"))
        set_champion(database, 0)
        await until(lambda: background.loader.leaving.keys() == {11})
        await until(lambda: background.loader.is_settled)  # its last heartbeat is too long ago now
        assert background.loader.table.calls[-1] == "unload 11"
