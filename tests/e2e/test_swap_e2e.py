"""Changes of traffic on a live server: nothing fails, nothing lies about its version, and a rollback is at once."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest
import sqlalchemy as sa

from scion_adapters import tables
from tests.e2e.conftest import ServerWorld
from tests.helpers.traffic import Traffic
from tests.helpers.waiting import wait_for

pytestmark = pytest.mark.e2e


async def test_swaps_under_steady_traffic_fail_no_request(world: ServerWorld) -> None:
    versions = [world.accept("chat2") for _ in range(3)]
    legal = {f"chat2:{world.champion('chat2')}", *(str(v.ref) for v in versions)}
    traffic = Traffic(world.server.url, "chat2")
    async with traffic.flowing():
        for version in versions:
            await asyncio.to_thread(world.promote, version)
            promoted_at = time.monotonic()
            await traffic.until_more(2 * traffic.num_clients)
            assert traffic.models_since(promoted_at) == {str(version.ref)}
    assert traffic.failed == []
    assert all(len(a.models) == 1 for a in traffic.answers), "an answer names exactly one version"
    assert {model for a in traffic.answers for model in a.models} <= legal
    first = versions[0].number - 1
    wait_for(lambda: f"chat2:{first}" not in str(world.status()["resident"]), what="the first champion is unloaded")
    assert {v["version"] for v in world.status()["resident"]} >= {str(versions[-1].ref), str(versions[-2].ref)}


async def test_a_rollback_is_at_once_and_loads_nothing(world: ServerWorld) -> None:
    good, bad = world.champion("chat3"), await asyncio.to_thread(world.accept, "chat3")
    await asyncio.to_thread(world.promote, bad)
    loads = world.metric("scion_adapter_loads_total", outcome="ok")
    traffic = Traffic(world.server.url, "chat3")
    async with traffic.flowing():
        rolled_back_at = time.monotonic()
        result = await asyncio.to_thread(world.rollouts.rollback, "chat3", actor="test", reason="users complain")
        await asyncio.to_thread(world.wait_followed)
        await traffic.until_more(2 * traffic.num_clients)
    assert (result.from_number, result.to_number, result.pending) == (bad.number, good, False)
    assert traffic.failed == []
    last_bad = max(a.started for a in traffic.answers if str(bad.ref) in a.models)
    assert last_bad - rolled_back_at <= 1.0, "the last request on the bad version started within a second"
    assert traffic.answers[-1].models == {f"chat3:{good}"}
    assert world.metric("scion_adapter_loads_total", outcome="ok") == loads


async def test_a_rollout_moves_only_the_added_slice(world: ServerWorld) -> None:
    champion, challenger = f"chat:{world.champion('chat')}", await asyncio.to_thread(world.accept, "chat")
    users = [f"slice-{i}" for i in range(24)]
    seen: dict[str, list[str]] = {user: [] for user in users}

    async def everybody() -> None:
        async with httpx.AsyncClient(base_url=world.server.url, timeout=120) as http:

            async def ask(user: str) -> None:
                body = {"model": "chat", "prompt": "Hi", "max_tokens": 1, "user": user}
                response = await http.post("/v1/completions", json=body)
                seen[user].append(response.json()["model"])

            await asyncio.gather(*map(ask, users))

    world.rollouts.start(challenger.ref, steps=[0.3, 0.7, 1.0], every_s=3600, guard=False, actor="test")
    try:
        await asyncio.to_thread(wait_for, lambda: world.status()["adapters"]["chat"]["weight"] == 0.3, timeout_s=30)
        await everybody()
        await everybody()
        taken = {user for user in users if seen[user][0] == str(challenger.ref)}
        assert 0 < len(taken) < len(users)
        assert all(len(set(models)) == 1 for models in seen.values()), "nobody changes version within a step"
        assert {model for models in seen.values() for model in models} == {champion, str(challenger.ref)}
        rows = [world.completion(i) for i in recorded_ids(world, challenger.number)]
        assert {row["probability"] for row in rows} == {0.3}
    finally:
        world.rollouts.rollback("chat", actor="test")
        world.wait_followed()


def recorded_ids(world: ServerWorld, number: int) -> list[str]:
    """Completions of chat:`number` that were drawn in a rollout."""
    columns = tables.completions.c

    def find() -> list[str]:
        query = sa.select(columns.id).where(
            columns.adapter == "chat", columns.number == number, columns.rollout_id.is_not(None)
        )
        with world.database.read() as connection:
            return list(connection.execute(query).scalars())

    return wait_for(find, what="drawn completions are recorded")
