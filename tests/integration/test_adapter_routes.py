"""`/v1/adapters` over HTTP, in vLLM's real application: what can be read, and what an upload becomes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from scion_adapters.aliases import set_alias_in
from scion_adapters.events import list_events
from scion_adapters.records import VersionRef
from tests.helpers.plugin_world import PluginWorld
from tests.helpers.uploads import VERSIONS, leftovers, parts


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[PluginWorld]:
    world = PluginWorld(tmp_path)
    yield world
    world.close()


@pytest.fixture
async def client(world: PluginWorld) -> AsyncIterator[httpx.AsyncClient]:
    async with world.serving() as client:
        yield client


async def test_an_upload_becomes_a_candidate_that_can_be_read(client: httpx.AsyncClient, world: PluginWorld) -> None:
    fields = {"reason": "from élsewhere", "parent": "0"}
    response = await client.post(VERSIONS, files=parts(world), data=fields)
    assert response.status_code == 201, response.text
    version = response.json()
    assert (version["version"], version["state"], version["parent"]) == ("chat:1", "candidate", 0)
    assert (version["created_by"], version["recipe"], version["object"]) == ("http", "import", "adapter.version")
    world.registry.store.verify(version["digest"])
    event = list_events(world.database, adapter="chat")[-1]
    assert (event.kind, event.actor, event.reason) == ("version.published", "http", "from élsewhere")
    assert not leftovers(world)

    (world.registry.store.report_path(VersionRef("chat", 1)) / "report.html").touch()
    with world.database.write() as connection:
        set_alias_in(connection, "chat", "candidate-1", 1, clock_value=1.0, actor="test")
    shown = (await client.get(f"{VERSIONS}/1")).json()
    assert shown == {**version, "report": ["report.html"], "aliases": ["candidate-1"]}, "names, and no paths"
    listed = (await client.get(VERSIONS)).json()
    assert (listed["object"], [item["version"] for item in listed["data"]]) == ("list", ["chat:1"])
    adapter = (await client.get("/v1/adapters/chat")).json()
    assert (adapter["aliases"], adapter["versions"]) == ({"candidate-1": 1}, listed["data"])
    assert adapter["history"][0]["alias"] == "candidate-1"
    assert (await client.get("/v1/adapters")).json()["data"] == [
        {"adapter": "chat", "num_versions": 1, "aliases": {"candidate-1": 1}}
    ]


async def test_no_answer_holds_the_gates_secret(client: httpx.AsyncClient, world: PluginWorld) -> None:
    answers = [await client.post(VERSIONS, files=parts(world))]
    for path in ("/v1/adapters", "/v1/adapters/chat", VERSIONS, f"{VERSIONS}/1"):
        answers.append(await client.get(path))
    secret = world.registry.version(VersionRef("chat", 1)).evaluation_key
    for answer in answers:
        assert answer.is_success
        assert secret not in answer.text
        assert "evaluation_key" not in answer.text


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v1/adapters/none", 404, "not_found"),
        ("/v1/adapters/none/versions", 404, "not_found"),
        ("/v1/adapters/chat/versions/1", 404, "not_found"),
        ("/v1/adapters/none/versions/1", 404, "not_found"),
        ("/v1/adapters/chat/versions/0", 400, "invalid_value"),  # the base is no version
        ("/v1/adapters/chat/versions/x", 400, "invalid_value"),
        ("/v1/adapters/CHAT/versions/1", 400, "invalid_value"),
    ],
)
async def test_what_is_not_there(client: httpx.AsyncClient, path: str, status: int, code: str) -> None:
    response = await client.get(path)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


async def test_an_upload_of_the_same_bytes_is_the_same_artifact(client: httpx.AsyncClient, world: PluginWorld) -> None:
    first = (await client.post(VERSIONS, files=parts(world))).json()
    second = (await client.post(VERSIONS, files=parts(world), data={"digest": first["digest"], "parent": "1"})).json()
    assert (second["version"], second["digest"], second["parent"]) == ("chat:2", first["digest"], 1)
    assert len(list((world.registry.store.root / "versions").iterdir())) == 1


async def test_an_upload_under_a_new_name_makes_the_adapter(client: httpx.AsyncClient, world: PluginWorld) -> None:
    """As `scion adapters import` does."""
    response = await client.post("/v1/adapters/code/versions", files=parts(world))
    assert (response.status_code, response.json()["version"]) == (201, "code:1")


async def test_what_peft_writes_beside_an_adapter_is_left_out(client: httpx.AsyncClient, world: PluginWorld) -> None:
    response = await client.post(VERSIONS, files=[*parts(world), ("README.md", b"model card")])
    assert response.status_code == 201
    stored = world.registry.store.path(response.json()["digest"])
    assert not (stored / "README.md").exists()


async def test_the_key_that_was_used_is_the_actor(world: PluginWorld) -> None:
    plugin = world.plugin()
    async with world.serving(plugin) as client:
        inner = world.app.app

        async def with_key(scope: Any, receive: Any, send: Any) -> None:
            scope.setdefault("state", {})["scion_actor"] = "key:release"
            await inner(scope, receive, send)

        transport = httpx.ASGITransport(with_key)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as keyed:
            response = await keyed.post(VERSIONS, files=parts(world))
        assert response.json()["created_by"] == "key:release"
        assert client
