"""One real server for all end-to-end tests: vLLM with the plugin on the demo's NF4 base, with three taught adapters.

Tests share it and may publish, promote and roll back; whoever restarts it leaves it running. Versions are made of small
random weights, so they answer nonsense that differs from version to version.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from scion_adapters import tables
from scion_adapters.database import Database
from scion_adapters.fingerprint import base_info
from scion_adapters.records import Version
from scion_adapters.registry import Registry, limits_of, open_registry
from scion_adapters.replicas import ReplicaLedger, wait_until_loaded
from scion_adapters.rollouts import Rollouts
from tests.helpers.adapters import make_adapter, make_loud
from tests.helpers.serving import DEMO_BASE, Server
from tests.helpers.waiting import wait_for

ADAPTERS = ("chat", "chat2", "chat3")
UNTAUGHT = "chat4"
"""Has no version: what is trained for it goes on from the base."""
TTL_S = 10.0


@dataclass
class ServerWorld:
    """The shared server, and its registry and database opened from outside."""

    server: Server
    registry: Registry
    rollouts: Rollouts
    client: httpx.Client
    seeds: Iterator[int] = field(default_factory=lambda: count(1))

    @property
    def database(self) -> Database:
        return self.registry.database

    def publish(self, adapter: str) -> Version:
        """A candidate with weights of its own."""
        settings = self.server.settings
        base = base_info(settings)
        made = self.server.home / "made" / f"{next(self.seeds)}"
        directory = make_adapter(made, base, seed=next(self.seeds), edit=make_loud)
        return self.registry.publish(adapter, directory, parent=0, base=base, limits=limits_of(settings), actor="test")

    def accept(self, adapter: str) -> Version:
        return self.registry.accept(self.publish(adapter).ref, actor="test", reason="looks good")

    def champion(self, adapter: str) -> int:
        return self.registry.aliases(adapter).get("champion", 0)

    def promote(self, version: Version) -> None:
        """Carry an accepted version to everybody; returns once it is champion and every server knows."""
        self.rollouts.start(version.ref, steps=[1.0], every_s=0.0, guard=False, actor="test")
        wait_for(lambda: self.champion(version.adapter) == version.number, timeout_s=30, what=f"{version.ref} promoted")
        self.wait_followed()

    def wait_followed(self) -> None:
        """Until the server acts on the present routing, with everything loaded."""

        def followed() -> bool:
            with self.database.read() as connection:
                query = sa.select(tables.counters.c.value).where(tables.counters.c.name == "routing")
                revision = connection.execute(query).scalar_one()
            return bool(self.status()["routing_revision"] == revision)

        wait_for(followed, timeout_s=30, what="the routing is followed")

    def wait_loaded(self, version: Version) -> None:
        wait_until_loaded(ReplicaLedger(self.database), version.lora_id, timeout_s=30, ttl_s=TTL_S)

    def status(self) -> dict[str, Any]:
        response = self.client.get("/v1/scion/status")
        response.raise_for_status()
        return dict(response.json())

    def ask(self, model: str, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
        """One request with a prompt that suits the route."""
        question = "What is the capital of France?"
        prompts: dict[str, dict[str, Any]] = {
            "/v1/completions": {"prompt": question, "max_tokens": 8},
            "/v1/responses": {"input": question, "max_output_tokens": 8},
        }
        prompt = prompts.get(path, {"messages": [{"role": "user", "content": question}], "max_tokens": 8})
        headers = body.pop("headers", {})
        return self.client.post(path, json={"model": model, **prompt, **body}, headers=headers)

    def completion(self, completion_id: str, timeout_s: float = 15.0) -> dict[str, Any]:
        """The recorded completion, once it is there."""

        def find() -> Any:
            with self.database.read() as connection:
                query = sa.select(tables.completions).where(tables.completions.c.id == completion_id)
                return connection.execute(query).mappings().first()

        return dict(wait_for(find, timeout_s=timeout_s, what=f"completion {completion_id} is recorded"))

    def metric(self, name: str, **labels: str) -> float:
        """The value of a metric, 0 when it is not shown."""
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        for line in self.client.get("/metrics").text.splitlines():
            series, _, value = line.rpartition(" ")
            shown, _, rest = series.partition("{")
            if shown == name and wanted == set(filter(None, rest.rstrip("}").split(","))):
                return float(value)
        return 0.0


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerWorld]:
    """The running server; each adapter's version 1 is its champion."""
    home: Path = tmp_path_factory.mktemp("server")
    server = Server.make(home, base=DEMO_BASE, adapters=(*ADAPTERS, UNTAUGHT))
    registry = open_registry(server.settings)
    with httpx.Client(base_url=server.url, timeout=120.0) as client:
        world = ServerWorld(server, registry, Rollouts(registry.database), client)
        for adapter in ADAPTERS:  # no server is live yet, so there is nobody to wait for
            version = world.accept(adapter)
            world.rollouts.start(version.ref, steps=[1.0], guard=False, actor="test")
            world.rollouts.promote(adapter, actor="test")
        with server:
            yield world
        assert ReplicaLedger(registry.database).live(TTL_S) == [], "a server that was stopped leaves the ledger"
    registry.database.dispose()
