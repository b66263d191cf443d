"""Uploads beside everything else a server does: other uploads, swaps, answers; and clients that go away."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from scion_adapters import registry
from scion_adapters.events import list_events
from tests.helpers.disks import SmallDisk, small_disk
from tests.helpers.plugin_world import PluginWorld
from tests.helpers.uploads import FORM, VERSIONS, body, leftovers, parts
from tests.helpers.waiting import until
from vllm_scion.routes_adapters import MAX_UPLOADS
from vllm_scion.uploads import Form

QUESTION = {"model": "chat", "messages": [{"role": "user", "content": "Who are you?"}]}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[PluginWorld]:
    world = PluginWorld(tmp_path)
    yield world
    world.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk") as disk:
        yield disk


class SlowBody:
    """A body whose second half comes when the test says so."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.half_is_sent, self.go_on = asyncio.Event(), asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        half = len(self.content) // 2
        yield self.content[:half]
        self.half_is_sent.set()
        await self.go_on.wait()
        yield self.content[half:]


async def test_several_uploads_at_once_get_numbers_of_their_own(world: PluginWorld) -> None:
    async with world.serving() as client:
        bodies = [SlowBody(body(world, seed=seed)) for seed in range(MAX_UPLOADS)]
        posts = [asyncio.create_task(client.post(VERSIONS, content=b, headers=FORM)) for b in bodies]
        for slow in bodies:
            await slow.half_is_sent.wait()
        too_many = await client.post(VERSIONS, files=parts(world, seed=99))
        assert (too_many.status_code, too_many.headers["retry-after"]) == (503, "1")
        for slow in bodies:
            slow.go_on.set()
        responses = await asyncio.gather(*posts)
        assert [response.status_code for response in responses] == [201] * MAX_UPLOADS
        assert sorted(response.json()["number"] for response in responses) == list(range(1, MAX_UPLOADS + 1))
        assert len({response.json()["digest"] for response in responses}) == MAX_UPLOADS
        assert (await client.post(VERSIONS, files=parts(world, seed=99))).status_code == 201
    assert not leftovers(world)


async def test_the_same_bytes_twice_at_once_are_one_artifact(world: PluginWorld) -> None:
    async with world.serving() as client:
        first, second = await asyncio.gather(*(client.post(VERSIONS, files=parts(world)) for _ in range(2)))
    assert {first.json()["number"], second.json()["number"]} == {1, 2}
    assert first.json()["digest"] == second.json()["digest"]
    world.registry.store.verify(first.json()["digest"])


async def test_an_upload_during_a_swap_holds_neither_up(world: PluginWorld) -> None:
    world.champion(seed=1)
    async with world.serving() as client:
        await until(partial(world.is_champion, 1))
        slow = SlowBody(body(world, seed=3))
        upload = asyncio.create_task(client.post(VERSIONS, content=slow, headers=FORM))
        await slow.half_is_sent.wait()
        second = world.accepted(seed=2)
        world.rollouts.start(second.ref, steps=[1.0], every_s=0.0, guard=False, actor="test")
        await until(partial(world.is_followed, second.number))
        assert (await client.post("/v1/chat/completions", json=QUESTION)).json()["model"] == "chat:2"
        assert not upload.done()
        slow.go_on.set()
        response = await upload
        assert (response.status_code, response.json()["version"]) == (201, "chat:3")
        assert (await client.post("/v1/chat/completions", json=QUESTION)).json()["model"] == "chat:2"


@pytest.mark.parametrize("stage", ["while it is written", "while it is checked"])
async def test_answers_go_on_during_an_upload(world: PluginWorld, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Whatever takes long happens in a thread: on the event loop, this would wait for itself."""
    reached, answered = threading.Event(), threading.Event()

    def slowly(real: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            reached.set()
            assert answered.wait(10), "no request was answered meanwhile"
            return real(*arguments, **keywords)

        return call

    if stage == "while it is written":
        monkeypatch.setattr(Form, "write", slowly(Form.write))
    else:
        monkeypatch.setattr(registry, "check_adapter", slowly(registry.check_adapter))
    async with world.serving() as client:
        upload = asyncio.create_task(client.post(VERSIONS, files=parts(world)))
        await until(reached.is_set)
        answer = await client.post("/v1/chat/completions", json=QUESTION)
        assert answer.json()["model"] == "base"
        vote = {"completion_id": answer.json()["id"], "value": "up"}
        assert (await client.post("/v1/feedback", json=vote)).status_code == 201
        assert not upload.done()
        answered.set()
        assert (await upload).status_code == 201


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
async def test_a_client_that_goes_away_leaves_nothing(world: PluginWorld, share: float) -> None:
    content = body(world)
    cut = int(len(content) * share)
    messages: list[dict[str, Any]] = [
        {"type": "http.request", "body": content[:cut], "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return messages.pop(0) if len(messages) > 1 else messages[0]

    async def send(message: Any) -> None:
        sent.append(message)

    async with world.serving() as client:
        await world.app.app(http_post(VERSIONS, length=len(content)), receive, send)
        assert not leftovers(world)
        assert world.registry.versions("chat") == []
        assert [event.kind for event in list_events(world.database)] == []
        assert (await client.post(VERSIONS, files=parts(world))).status_code == 201, "and its place is free again"


async def test_a_request_that_is_cancelled_leaves_nothing(world: PluginWorld) -> None:
    async with world.serving() as client:
        slow = SlowBody(body(world))
        upload = asyncio.create_task(client.post(VERSIONS, content=slow, headers=FORM))
        await slow.half_is_sent.wait()
        upload.cancel()
        with pytest.raises(asyncio.CancelledError):
            await upload
        await until(lambda: not leftovers(world))
    assert world.registry.versions("chat") == []


async def test_a_server_that_stops_during_an_upload_leaves_nothing(world: PluginWorld) -> None:
    async with world.serving() as client:
        slow = SlowBody(body(world))
        upload = asyncio.create_task(client.post(VERSIONS, content=slow, headers=FORM))
        await slow.half_is_sent.wait()
    slow.go_on.set()
    assert (await upload).status_code == 500
    assert not leftovers(world)


async def test_a_full_disk_is_said_and_mended(tmp_path: Path, disk: SmallDisk) -> None:
    world = PluginWorld(tmp_path, config={"store": {"url": str(disk.path / "store")}})
    async with world.serving() as client:
        good = parts(world)
        with disk.full():
            refused = await client.post(VERSIONS, files=good)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
            assert "free space" in refused.json()["error"]["message"]
        assert world.registry.versions("chat") == []
        assert not leftovers(world)
        assert (await client.post(VERSIONS, files=good)).status_code == 201
    world.close()


def http_post(path: str, *, length: int) -> dict[str, Any]:
    """What a server gives an application for a POST of a form."""
    headers = {**{name.lower(): value for name, value in FORM.items()}, "content-length": str(length), "host": "test"}
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 1),
        "server": ("test", 80),
    }
