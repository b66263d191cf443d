"""Several processes that answer: API servers in front of one engine, copies of the engine, replicas on one database.

Every change of traffic must be the same everywhere within a second, and no request may fail meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count, cycle
from pathlib import Path
from typing import Any

import httpx
import pytest

from scion_adapters.fingerprint import base_info
from scion_adapters.records import Replica, Version
from scion_adapters.registry import Registry, limits_of, open_registry
from scion_adapters.replicas import ReplicaLedger, wait_until_loaded, wait_until_routed
from scion_adapters.rollouts import Rollouts
from tests.helpers.adapters import make_adapter
from tests.helpers.postgres import PostgresMissingError, postgres_cluster
from tests.helpers.serving import Server, halves
from tests.helpers.waiting import until, wait_for

pytestmark = pytest.mark.e2e

TTL_S = 10.0
AGREED_S = 1.0
NUM_CLIENTS = 4


@dataclass
class Fleet:
    """Running servers on one database and one store, seen from outside."""

    servers: list[Server]
    registry: Registry
    num_processes: int
    num_engines: int
    seeds: Iterator[int] = field(default_factory=lambda: count(1))

    def __post_init__(self) -> None:
        self.rollouts = Rollouts(self.registry.database)
        self.ledger = ReplicaLedger(self.registry.database)

    def live(self) -> list[Replica]:
        return self.ledger.live(TTL_S)

    def accept(self) -> Version:
        settings = self.servers[0].settings
        base, seed = base_info(settings), next(self.seeds)
        directory = make_adapter(self.servers[0].home / "made" / f"{seed}", base, seed=seed)
        made = self.registry.publish("chat", directory, parent=0, base=base, limits=limits_of(settings), actor="test")
        return self.registry.accept(made.ref, actor="test", reason="looks good")

    def promote(self, version: Version) -> None:
        """Start, wait until every process holds it, promote; returns once it is written."""
        self.rollouts.start(version.ref, steps=[0.5, 1.0], every_s=3600.0, guard=False, actor="test")
        wait_until_loaded(self.ledger, version.lora_id, timeout_s=30.0, ttl_s=TTL_S, poll_s=0.02)
        self.rollouts.promote("chat", actor="test")

    def seconds_until_agreed(self) -> float:
        started = time.monotonic()
        revision = self.rollouts.routing_revision()
        wait_until_routed(self.ledger, revision, timeout_s=30.0, ttl_s=TTL_S, poll_s=0.01)
        return time.monotonic() - started


@dataclass
class Traffic:
    """Clients that ask without a pause, each request on a connection of its own, so that every process gets some."""

    fleet: Fleet
    answers: list[tuple[float, int, set[str]]] = field(default_factory=list)  # when it began, status, models named
    stopping: bool = False

    async def client(self, number: int) -> None:
        for server in cycle(self.fleet.servers):
            if self.stopping:
                return
            body = {"model": "chat", "prompt": "Paris is", "max_tokens": 6, "user": f"u{number}", "stream": True}
            started = time.monotonic()
            async with httpx.AsyncClient(timeout=120) as http:
                response = await http.post(f"{server.url}/v1/completions", json=body)
            models = {part.split('"')[0] for part in response.text.split('"model":"')[1:]}
            self.answers.append((started, response.status_code, models))

    async def __aenter__(self) -> Traffic:
        self._tasks = [asyncio.create_task(self.client(number)) for number in range(NUM_CLIENTS)]
        await self.until_more(2 * NUM_CLIENTS)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.stopping = True
        await asyncio.gather(*self._tasks)

    async def until_more(self, num_answers: int) -> None:
        goal = len(self.answers) + num_answers
        await until(lambda: len(self.answers) >= goal, timeout_s=120)


@pytest.fixture(scope="module", params=["two API servers", "two engines", "two replicas"])
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    home = tmp_path_factory.mktemp("fleet")
    config: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        if request.param == "two replicas":
            try:
                cluster = stack.enter_context(postgres_cluster())
            except PostgresMissingError as error:
                pytest.skip(str(error))
            config = {
                "database": {"url": cluster.create("scion")},
                "store": {"url": str(home / "artifacts")},
                "privacy": {"hash_key": "k" * 32},
            }
            servers = [
                Server.make(home / name, threads=1, config=config, cores=cores)
                for name, cores in zip(("one", "two"), halves(), strict=True)
            ]
            shape = (2, 2)
        elif request.param == "two engines":
            servers, shape = [make(home / "one", {"server": {"data_parallel_size": 2}})], (2, 1)
        else:
            servers, shape = [make(home / "one", {"server": {"api_server_count": 2}})], (2, 1)
        registry = open_registry(servers[0].settings)
        stack.callback(registry.database.dispose)
        for server in servers:
            stack.enter_context(server)
        yield Fleet(servers, registry, *shape)


def make(home: Path, config: dict[str, dict[str, Any]]) -> Server:
    return Server.make(home, threads=1, config=config)


def test_every_process_reports_itself(fleet: Fleet) -> None:
    live = wait_for(lambda: len(fleet.live()) == fleet.num_processes and fleet.live(), what="all processes report")
    assert isinstance(live, list)
    assert len({replica.pid for replica in live}) == fleet.num_processes
    assert len({replica.engine for replica in live}) == fleet.num_engines


async def test_swaps_and_a_rollback_are_the_same_everywhere_within_a_second(fleet: Fleet) -> None:
    versions = [await asyncio.to_thread(fleet.accept) for _ in range(3)]
    async with Traffic(fleet) as traffic:
        for version in versions:
            await asyncio.to_thread(fleet.promote, version)
            assert await asyncio.to_thread(fleet.seconds_until_agreed) <= AGREED_S
            agreed_at = time.monotonic()
            await traffic.until_more(3 * NUM_CLIENTS)
            late = {model for started, _, models in traffic.answers if started >= agreed_at for model in models}
            assert late == {str(version.ref)}
        rolled_back_at = time.monotonic()
        await asyncio.to_thread(fleet.rollouts.rollback, "chat", actor="test", reason="users complain")
        assert await asyncio.to_thread(fleet.seconds_until_agreed) <= AGREED_S
        await traffic.until_more(3 * NUM_CLIENTS)
    assert [status for _, status, _ in traffic.answers if status != 200] == []
    assert all(len(models) == 1 for _, _, models in traffic.answers), "an answer names exactly one version"
    last_bad = max(started for started, _, models in traffic.answers if str(versions[-1].ref) in models)
    assert last_bad - rolled_back_at <= AGREED_S


def test_what_no_process_needs_any_more_leaves_every_engine(fleet: Fleet) -> None:
    retired = fleet.registry.versions("chat")[0]
    wait_for(
        lambda: all(retired.lora_id not in replica.loaded for replica in fleet.live()), what="nobody has it loaded"
    )

    def engines() -> dict[str, list[str]]:
        """What is leaving, as each process that happens to answer says."""
        answers = [httpx.get(f"{server.url}/v1/scion/status").json() for server in fleet.servers for _ in range(4)]
        return {answer["replica"]: answer["leaving"] for answer in answers}

    wait_for(lambda: not any(engines().values()), what="no slot is kept for a version that is not used")
    for server in fleet.servers:  # with several processes on one port, any of them shows the sum
        metrics = httpx.get(f"{server.url}/metrics").text
        removed = [line for line in metrics.splitlines() if line.startswith("scion_adapter_unloads_total ")]
        assert float(removed[0].split()[1]) >= 1, "the engine still holds it"
