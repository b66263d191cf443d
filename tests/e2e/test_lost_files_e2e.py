"""Directories of served versions deleted under a live server: it lives, no request fails, traffic goes on."""

from __future__ import annotations

import asyncio
import shutil
import time

import pytest

from scion_adapters.events import list_events
from scion_adapters.records import RolloutState, Version, VersionState
from tests.e2e.conftest import ServerWorld
from tests.helpers.traffic import Traffic
from tests.helpers.waiting import until, wait_for

pytestmark = pytest.mark.e2e


async def lose(world: ServerWorld, version: Version) -> float:
    """Delete the version's directory and wait until the servers route around it; when that was (monotonic clock)."""
    shutil.rmtree(world.registry.store.path(version.digest))
    await until(lambda: world.registry.version(version.ref).state is VersionState.QUARANTINED, f"{version.ref} is lost")
    await asyncio.to_thread(world.wait_followed)
    return time.monotonic()


def assert_told(world: ServerWorld, version: Version) -> None:
    """One event says who noticed, and what."""
    (event,) = [e for e in list_events(world.database, adapter=version.adapter, limit=1000)
                if e.kind == "version.quarantined" and e.number == version.number]  # fmt: skip
    assert event.actor.startswith("server-")
    assert "missing" in event.reason


def left_the_engine(world: ServerWorld, version: Version) -> bool:
    return str(version.ref) not in {resident["version"] for resident in world.status()["resident"]}


async def test_a_challenger_that_is_deleted_gives_its_users_back_to_the_champion(world: ServerWorld) -> None:
    champion = f"chat3:{world.champion('chat3')}"
    challenger = await asyncio.to_thread(world.accept, "chat3")
    process = world.server.process
    traffic = Traffic(world.server.url, "chat3")
    async with traffic.flowing():
        world.rollouts.start(challenger.ref, steps=[0.9, 1.0], every_s=3600, guard=False, actor="test")
        await until(
            lambda: any(str(challenger.ref) in a.models for a in traffic.answers[-6:]), "the challenger answers"
        )
        lost_at = await lose(world, challenger)
        await traffic.until_more(2 * traffic.num_clients)
        await until(lambda: left_the_engine(world, challenger), f"{challenger.ref} is removed from the engine")
        await traffic.until_more(2 * traffic.num_clients)
    assert traffic.failed == []
    assert traffic.models_since(lost_at) == {champion}
    assert world.rollouts.list("chat3")[0].state is RolloutState.ABORTED
    assert_told(world, challenger)
    assert process is world.server.process
    assert process is not None
    assert process.poll() is None, "the server died"


async def test_champions_that_are_deleted_go_back_to_their_predecessor_and_then_to_the_base(world: ServerWorld) -> None:
    first, second = [await asyncio.to_thread(world.accept, "chat3") for _ in range(2)]
    for version in (first, second):
        await asyncio.to_thread(world.promote, version)
    process = world.server.process
    traffic = Traffic(world.server.url, "chat3")
    async with traffic.flowing():
        lost_at = await lose(world, second)
        await traffic.until_more(2 * traffic.num_clients)
        lost_too_at = await lose(world, first)
        await traffic.until_more(2 * traffic.num_clients)
        wait_for(lambda: left_the_engine(world, first) and left_the_engine(world, second), "both leave the engine")
        await traffic.until_more(2 * traffic.num_clients)
    assert traffic.failed == []
    between = {model for a in traffic.answers if lost_at <= a.started < lost_too_at for model in a.models}
    assert str(first.ref) in between
    assert str(second.ref) not in between
    assert traffic.models_since(lost_too_at) == {"base"}
    for version in (first, second):
        assert_told(world, version)
    assert process is not None
    assert process.poll() is None, "the server died"
    await asyncio.to_thread(world.promote, await asyncio.to_thread(world.accept, "chat3"))  # it goes on, and takes more
    assert world.ask("chat3").json()["model"] == f"chat3:{world.champion('chat3')}"
