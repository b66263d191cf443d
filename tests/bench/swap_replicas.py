"""How fast a change reaches two replicas that share a PostgreSQL and a directory of artifacts."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from scion_adapters.settings import load_settings
from tests.bench.markers import Marker
from tests.bench.storm_clients import Clients
from tests.bench.swap_world import Operator
from tests.helpers.postgres import postgres_cluster
from tests.helpers.serving import Server, halves

NUM_CLIENTS = 8


@dataclass(slots=True)
class Latencies:
    """Seconds, one per trial. Servable: from the publish call until both replicas answered as the version."""

    servable_s: list[float] = field(default_factory=list)
    rollback_s: list[float] = field(default_factory=list)
    num_failed: int = 0

    @property
    def servable_median(self) -> float:
        return statistics.median(self.servable_s)

    @property
    def rollback_worst(self) -> float:
        return max(self.rollback_s)

    def to_json(self) -> dict[str, Any]:
        return {
            "servable_ms": [round(seconds * 1e3, 1) for seconds in self.servable_s],
            "rollback_ms": [round(seconds * 1e3, 1) for seconds in self.rollback_s],
            "failed": self.num_failed,
        }


def measure_replicas(home: Path, templates: list[Marker], num_trials: int) -> Latencies:
    """Start a database and two servers, keep them busy, and publish, promote and roll back `num_trials` times."""
    with ExitStack() as stack:
        cluster = stack.enter_context(postgres_cluster())
        config: dict[str, dict[str, Any]] = {
            "database": {"url": cluster.create("scion")},
            "store": {"url": str(home / "artifacts")},
            "privacy": {"hash_key": "k" * 32},
        }
        servers = [
            Server.make(home / name, threads=1, config=config, cores=cores)
            for name, cores in zip(("one", "two"), halves(), strict=True)
        ]
        operator = Operator(load_settings(servers[0].home / "scion.toml"), templates, home / "publish")
        stack.callback(operator.registry.database.dispose)
        operator.serve_first()
        for server in servers:
            stack.enter_context(server)
        return asyncio.run(_trials([server.url for server in servers], operator, num_trials))


async def _trials(urls: list[str], operator: Operator, num_trials: int) -> Latencies:
    found = Latencies()
    clients = Clients(urls, NUM_CLIENTS)
    async with clients:
        for _ in range(num_trials):
            found.servable_s.append(await asyncio.to_thread(_publish_and_ask, urls, operator))
            await asyncio.to_thread(operator.promote_by_hand)
            await asyncio.sleep(0.3)
            bad, at = await asyncio.to_thread(operator.rollback)
            await asyncio.sleep(1.2)
            late = [a.started - at for a in clients.answers if a.models == {bad} and a.started > at]
            found.rollback_s.append(max(late, default=0.0))
            await asyncio.to_thread(operator.retire_unused)
            await asyncio.to_thread(operator.collect)
    found.num_failed = sum(answer.status != 200 or bool(answer.error) for answer in clients.answers)
    return found


def _publish_and_ask(urls: list[str], operator: Operator) -> float:
    """Publish, give the version an alias, and ask each replica for it until it answers."""
    began = time.monotonic()
    version = operator.publish()
    operator.registry.set_alias("chat", "fresh", version.number, actor="storm")
    ended: list[float] = []

    def ask(url: str) -> None:
        body = {"model": "chat@fresh", "prompt": "Hi", "max_tokens": 1}
        with httpx.Client(timeout=60.0) as http:
            while http.post(f"{url}/v1/completions", json=body).json().get("model") != str(version.ref):
                time.sleep(0.01)
        ended.append(time.monotonic())

    threads = [threading.Thread(target=ask, args=(url,)) for url in urls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    operator.registry.remove_alias("chat", "fresh", actor="storm")
    return max(ended) - began
