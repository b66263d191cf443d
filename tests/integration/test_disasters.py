"""Full disk, read-only store, database gone: serving goes on, writes are refused with a clear error, all catches up.

The server is vLLM's real application with the plugin inside and a fake engine. docs/failures.md says the same in words.
"""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from scion_adapters import database as database_module
from scion_adapters import tables
from scion_adapters.cli.main import main
from scion_adapters.errors import UnavailableError
from scion_adapters.gc import collect
from scion_adapters.replicas import ReplicaLedger, lacking
from scion_adapters.retirement import retire
from scion_adapters.status import read_status
from tests.helpers.disks import SmallDisk, small_disk
from tests.helpers.legal_state import check_legal, residue
from tests.helpers.plugin_world import PluginWorld
from tests.helpers.postgres import postgres_cluster, standing_by, start_cluster, stop_cluster
from tests.helpers.waiting import until
from vllm_scion.runtime import Runtime

PATIENT = {"rollout": {"poll_interval_s": 60.0, "heartbeat_s": 0.2}}
"""Changes are heard of, not found by looking."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk") as disk:
        yield disk


async def ask(client: httpx.AsyncClient) -> str:
    """Which version answers `chat`."""
    body = {"model": "chat", "messages": [{"role": "user", "content": "Who are you?"}]}
    response = await client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["model"])


async def vote(client: httpx.AsyncClient, vote_id: str) -> httpx.Response:
    return await client.post("/v1/feedback", json={"id": vote_id, "completion_id": "chatcmpl-1", "value": "up"})


async def assert_refused(client: httpx.AsyncClient, vote_id: str, why: str) -> None:
    response = await vote(client, vote_id)
    assert (response.status_code, response.headers["retry-after"]) == (503, "1"), response.text
    assert why in response.json()["error"]["message"]


def votes(world: PluginWorld) -> set[str]:
    with world.database.read() as connection:
        return set(connection.execute(sa.select(tables.feedback.c.id)).scalars())


def running(world: PluginWorld) -> Runtime:
    runtime = world.last_plugin.runtime
    assert runtime is not None
    return runtime


async def run_cli(world: PluginWorld, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of `scion …`."""
    monkeypatch.setenv("SCION_CONFIG", str(world.home / "scion.toml"))
    monkeypatch.setattr(sys, "argv", ["scion", *arguments])
    with pytest.raises(SystemExit) as ended:
        await asyncio.to_thread(main)
    assert isinstance(ended.value.code, int)
    return ended.value.code


async def captured(client: httpx.AsyncClient) -> dict[str, object]:
    return dict((await client.get("/v1/scion/status")).json()["capture"])


# --- the disk ---------------------------------------------------------------------------------------------------------


async def test_a_full_disk(tmp_path: Path, disk: SmallDisk) -> None:
    config = {"store": {"url": str(disk.path / "store")}, "capture": {"journal": str(disk.path / "journal")}}
    world = PluginWorld(tmp_path, url=f"sqlite:///{disk.path / 'scion.db'}", config=config)
    world.champion(seed=1)
    async with world.serving() as client:
        await until(partial(world.is_champion, 1))
        await until(partial(world.is_followed, 1))
        assert (await vote(client, "before")).status_code == 201
        files = sorted(world.registry.store.root.rglob("*"))
        with disk.full():
            with pytest.raises(UnavailableError, match="No space left on device: free space"):
                world.candidate(seed=2)
            assert sorted(world.registry.store.root.rglob("*")) == files, "something was left behind"
            for number in range(50):  # what fits into the log's last page is stored, and only that is acknowledged
                if (await vote(client, f"full-{number}")).status_code != 201:
                    break
            await assert_refused(client, "refused", "free space")
            for _ in range(200):  # so many do not fit into the journal's last page
                assert await ask(client) == "chat:1"
            lost = running(world).recorder.stats
            await until(lambda: lost().lost)
            assert lost().lost.keys() == {"journal_error"}
        assert votes(world) == {"before", *(f"full-{n}" for n in range(number))}

        assert (await vote(client, "refused")).status_code == 201
        assert world.champion(seed=2).number == 2
        await until(partial(world.is_followed, 2))
        assert await ask(client) == "chat:2"
        await until(lambda: world.completions())
    check_legal(world.database, world.registry.store)
    assert residue(world.database, world.registry.store) == []
    world.close()


def test_gc_makes_space_on_a_full_disk(tmp_path: Path, disk: SmallDisk) -> None:
    world = PluginWorld(tmp_path, config={"store": {"url": str(disk.path / "store")}})
    old = world.accepted(seed=1)
    retire(world.database, old.ref, actor="test")
    with disk.full():
        collect(world.registry, rollback_window_s=0.0, grace_s=0.0)
        assert world.candidate(seed=2).number == 2
    check_legal(world.database, world.registry.store)
    assert residue(world.database, world.registry.store) == []
    world.close()


async def test_a_read_only_store(tmp_path: Path, disk: SmallDisk) -> None:
    world = PluginWorld(tmp_path, config={"store": {"url": str(disk.path / "store")}})
    world.champion(seed=1)
    waiting = world.accepted(seed=2)
    async with world.serving() as client:
        await until(partial(world.is_followed, 1))
        with disk.read_only():
            with pytest.raises(UnavailableError, match="Read-only file system: make it writable"):
                world.candidate(seed=3)
            assert await ask(client) == "chat:1"
            world.rollouts.start(waiting.ref, steps=[1.0], every_s=0.0, guard=False, actor="test")  # loading only reads
            await until(partial(world.is_followed, 2))
            assert await ask(client) == "chat:2"
            assert (await vote(client, "meanwhile")).status_code == 201
        assert world.candidate(seed=3).number == 3, "no number was used up"
    check_legal(world.database, world.registry.store)
    assert residue(world.database, world.registry.store) == []
    world.close()


# --- the database -----------------------------------------------------------------------------------------------------


async def test_postgresql_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with postgres_cluster() as cluster:
        world = PluginWorld(tmp_path, url=cluster.create("scion"), config=PATIENT)
        world.champion(seed=1)
        world.rollouts.promote("chat", actor="test")  # no controller looks for the next minute
        async with world.serving() as client:
            assert await ask(client) == "chat:1"
            await until(world.completions)
            await asyncio.to_thread(stop_cluster, cluster)
            background = running(world).background
            await until(lambda: background._broken >= {"listen", "report"})
            assert [await ask(client) for _ in range(3)] == ["chat:1"] * 3
            await assert_refused(client, "meanwhile", "does not answer")
            assert (await captured(client))["lost"] == {}
            for command in (["status"], ["rollback", "chat"], ["adapters", "list"]):
                assert await run_cli(world, monkeypatch, *command) == UnavailableError.exit_code

            await asyncio.to_thread(start_cluster, cluster)
            await until(lambda: len(world.completions()) == 4)
            await until(lambda: not background._broken - {"routing"})
            (replica,) = ReplicaLedger(world.database).live(1.0)
            assert replica.id == background.identity.id
            assert (await vote(client, "meanwhile")).status_code == 201
            version = world.champion(seed=2)
            await until(lambda: version.lora_id in background.loader.loaded)  # heard: looked at once a minute
            await until(lambda: not lacking(ReplicaLedger(world.database).live(1.0), version.lora_id))
            world.rollouts.promote("chat", actor="test")
            await until(partial(world.is_followed, 2))
            assert await ask(client) == "chat:2"
        world.close()


async def test_postgresql_that_only_reads(tmp_path: Path) -> None:
    with postgres_cluster() as cluster:
        world = PluginWorld(tmp_path, url=cluster.create("scion"))
        world.champion(seed=1)
        async with world.serving() as client:
            await until(partial(world.is_champion, 1))
            await until(partial(world.is_followed, 1))
            standby = standing_by(cluster)
            await asyncio.to_thread(standby.__enter__)
            background = running(world).background
            await until(lambda: "report" in background._broken)
            assert [await ask(client) for _ in range(3)] == ["chat:1"] * 3
            await assert_refused(client, "meanwhile", "name the primary in database.url")
            with pytest.raises(UnavailableError, match="promote it"):
                world.candidate(seed=2)
            with pytest.raises(UnavailableError, match="promote it"):
                world.rollouts.rollback("chat", actor="me")
            assert read_status(world.database, world.settings).routing_revision > 0, "it can be read"
            assert (await captured(client))["lost"] == {}

            await asyncio.to_thread(standby.__exit__, None, None, None)
            await until(lambda: len(world.completions()) == 3)
            await until(lambda: not background._broken)
            assert (await vote(client, "meanwhile")).status_code == 201
            world.champion(seed=2)
            await until(partial(world.is_followed, 2))
        world.close()


async def test_sqlite_held_by_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "BUSY_TIMEOUT_S", 0.2)
    world = PluginWorld(tmp_path)
    world.champion(seed=1)
    async with world.serving() as client:
        await until(partial(world.is_champion, 1))
        await until(partial(world.is_followed, 1))
        background = running(world).background
        with closing(sqlite3.connect(tmp_path / "scion.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            await until(lambda: "report" in background._broken)
            assert [await ask(client) for _ in range(3)] == ["chat:1"] * 3
            await assert_refused(client, "meanwhile", "locked")
            assert await run_cli(world, monkeypatch, "rollback", "chat") == UnavailableError.exit_code
            assert world.completions() == []
            other.execute("ROLLBACK")
        await until(lambda: len(world.completions()) == 3)
        await until(lambda: not background._broken)
        assert (await vote(client, "meanwhile")).status_code == 201
        world.champion(seed=2)
        await until(partial(world.is_followed, 2))
    world.close()
