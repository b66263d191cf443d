"""Files deleted under a running server, and versions retired from it: vLLM's application with a fake engine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from scion_adapters.events import list_events
from scion_adapters.gc import collect
from scion_adapters.records import Version, VersionState
from scion_adapters.retirement import retire
from tests.helpers.plugin_world import PluginWorld
from tests.helpers.waiting import until

QUESTION = {"messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[PluginWorld]:
    world = PluginWorld(tmp_path)
    yield world
    world.close()


def remove_directory(world: PluginWorld, version: Version) -> None:
    shutil.rmtree(world.registry.store.path(version.digest))


def state(world: PluginWorld, version: Version) -> VersionState:
    return world.registry.version(version.ref).state


async def promoted(world: PluginWorld, version: Version) -> Version:
    await until(lambda: world.is_champion(version.number))
    await until(lambda: world.is_followed(version.number))
    return version


async def test_traffic_of_a_version_whose_directory_was_deleted_goes_back(world: PluginWorld) -> None:
    async with world.serving() as client:
        first = await promoted(world, world.champion(seed=1))
        second = await promoted(world, world.champion(seed=2))
        remove_directory(world, second)
        await until(lambda: state(world, second) is VersionState.QUARANTINED)
        await until(lambda: world.is_followed(first.number))
        answer = await client.post("/v1/chat/completions", json={"model": "chat", **QUESTION})
        assert answer.json()["model"] == str(first.ref)
        exact = await client.post("/v1/chat/completions", json={"model": str(second.ref), **QUESTION})
        assert exact.status_code == 404
        (event,) = [e for e in list_events(world.database) if e.kind == "version.quarantined"]
        assert event.actor.startswith("server-")
        assert "missing" in event.reason


async def test_a_store_that_is_gone_altogether_moves_no_traffic(world: PluginWorld) -> None:
    async with world.serving() as client:
        version = await promoted(world, world.champion())
        versions = world.registry.store.root / "versions"
        away = versions.rename(versions.with_name("unmounted"))
        checks = world.last_plugin.runtime.background.check_files  # type: ignore[union-attr]
        checks(tuple(world.last_plugin.runtime.background.loader.loaded.values()))  # type: ignore[union-attr]
        answer = await client.post("/v1/chat/completions", json={"model": "chat", **QUESTION})
        assert answer.json()["model"] == str(version.ref)
        assert state(world, version) is VersionState.ACCEPTED
        away.rename(versions)


async def test_a_retired_version_leaves_the_engine_before_its_files_may_go(world: PluginWorld) -> None:
    async with world.serving():
        first, second, third = [await promoted(world, world.champion(seed=seed)) for seed in (1, 2, 3)]
        engine = world.app.engine
        await until(lambda: f"remove {first.ref}" in engine.calls)  # neither champion nor previous
        retire(world.database, first.ref, actor="test")
        await until(lambda: collect(world.registry, rollback_window_s=0, grace_s=0)[0].version.number != 1)
        assert not world.registry.store.has(first.digest)
        assert world.registry.store.has(second.digest)
        assert world.registry.store.has(third.digest)
