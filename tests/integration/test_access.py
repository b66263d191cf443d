"""Keys on vLLM's real application: who gets in, on both databases, and that no secret is written anywhere."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from scion_adapters.errors import NotFoundError
from scion_adapters.events import list_events
from scion_adapters.keys import Scope, create_key, list_keys, load_key_ring, revoke_key
from tests.helpers.plugin_world import PluginWorld
from tests.helpers.polling import until

CHAT = {"model": "chat", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture(params=["sqlite", "postgresql"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PluginWorld]:
    url = request.getfixturevalue("postgres_database").url if request.param == "postgresql" else None
    world = PluginWorld(tmp_path, url=url)
    yield world
    world.close()


def bearer(plain: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {plain}"}


async def status(client: httpx.AsyncClient, path: str, plain: str | None = None) -> int:
    headers = bearer(plain) if plain else {}
    if path.endswith("completions"):
        return (await client.post(path, json=CHAT, headers=headers)).status_code
    return (await client.get(path, headers=headers)).status_code


def closes(world: PluginWorld) -> bool:
    return not world.last_plugin.gatekeeper.ring.is_open


async def test_the_first_key_closes_a_running_server(world: PluginWorld) -> None:
    async with world.serving() as client:
        assert await status(client, "/v1/chat/completions") == 200
        assert await status(client, "/v1/scion/status") == 200
        _, chat = create_key(world.database, "shop", Scope.CHAT, actor="me")
        _, ops = create_key(world.database, "night", Scope.OPS, actor="me")
        await until(lambda: len(world.last_plugin.gatekeeper.ring.keys) == 2)
        expected = {
            "/v1/chat/completions": (401, 401, 200, 200),
            "/v1/models": (401, 401, 200, 200),
            "/v1/scion/status": (401, 401, 403, 200),
            "/version": (200, 200, 200, 200),
            "/metrics": (200, 200, 200, 200),
        }
        for path, statuses in expected.items():
            seen = [await status(client, path, key) for key in (None, "sk-wrong", chat, ops)]
            assert tuple(seen) == statuses, path


async def test_refusals_have_the_shape_that_clients_parse(world: PluginWorld) -> None:
    _, chat = create_key(world.database, "shop", Scope.CHAT, actor="me")
    async with world.serving() as client:
        refused = await client.post("/v1/chat/completions", json=CHAT)
        assert refused.json()["error"]["code"] == "invalid_api_key"
        assert refused.headers["www-authenticate"] == "Bearer"
        narrow = await client.get("/v1/scion/status", headers=bearer(chat))
        assert narrow.json()["error"]["code"] == "insufficient_scope"
        anthropic = await client.post("/v1/messages", json=CHAT)
        assert anthropic.json()["error"]["type"] == "authentication_error"
        answer = await client.post("/v1/messages", json={**CHAT, "max_tokens": 5}, headers={"x-api-key": chat})
        assert answer.status_code == 200


async def test_streams_stream_behind_a_key(world: PluginWorld) -> None:
    _, chat = create_key(world.database, "shop", Scope.CHAT, actor="me")
    async with (
        world.serving() as client,
        client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}, headers=bearer(chat)) as response,
    ):
        chunks = [line async for line in response.aiter_lines() if line]
    assert chunks[-1] == "data: [DONE]"


async def test_a_revoked_key_is_refused_within_a_moment_and_the_server_stays_closed(world: PluginWorld) -> None:
    key, chat = create_key(world.database, "shop", Scope.CHAT, actor="me")
    async with world.serving() as client:
        assert await status(client, "/v1/models", chat) == 200
        revoke_key(world.database, key.id, actor="me", reason="left the company")
        await until(lambda: world.last_plugin.gatekeeper.ring.keys[key.id].revoked_at is not None)
        assert await status(client, "/v1/models", chat) == 401
        assert await status(client, "/v1/models") == 401


async def test_a_refusal_is_an_event_and_no_secret_is_written_anywhere(
    world: PluginWorld, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    key, chat = create_key(world.database, "shop", Scope.CHAT, actor="me")
    secret = chat.removeprefix(f"sk-scion-{key.id}-")
    wrong = chat[:-3] + "xyz"
    async with world.serving() as client:
        for plain in (wrong, wrong, chat):
            await client.get("/v1/scion/status", headers=bearer(plain))
        await until(lambda: sum(e.kind == "access.refused" for e in list_events(world.database)) == 2)
        metrics = (await client.get("/metrics")).text
    events = [e for e in list_events(world.database, limit=1000) if e.kind == "access.refused"]
    assert {(e.data["reason"], e.data["count"], e.data["key_id"]) for e in events} == {
        ("unknown", 2, key.id),
        ("scope", 1, key.id),
    }
    stored = repr(list_events(world.database, limit=1000)) + repr(list_keys(world.database))
    for text in (stored, caplog.text, metrics, repr(load_key_ring(world.database))):
        assert secret not in text
        assert wrong not in text


async def test_the_names_of_ops_keys_stand_with_what_they_do(world: PluginWorld) -> None:
    _, ops = create_key(world.database, "night shift", Scope.OPS, actor="me")
    version = world.candidate()
    files = world.registry.store.path(version.digest)
    form = {name: (name, (files / name).read_bytes()) for name in ("adapter_config.json", "adapter_model.safetensors")}
    async with world.serving() as client:
        response = await client.post("/v1/adapters/chat/versions", files=form, headers=bearer(ops))
        assert response.status_code == 201, response.text
    assert [e.actor for e in list_events(world.database) if e.kind == "version.published"][-1] == "night shift"


def test_keys_are_listed_and_revoked_once(world: PluginWorld) -> None:
    key, _ = create_key(world.database, "shop", Scope.CHAT, actor="me")
    assert [(k.name, k.scope, k.revoked_at) for k in list_keys(world.database)] == [("shop", Scope.CHAT, None)]
    for _ in range(2):
        revoke_key(world.database, key.id, actor="me")
    kinds = [event.kind for event in list_events(world.database)]
    assert kinds.count("key.revoked") == 1
    with pytest.raises(NotFoundError, match="keys list"):
        revoke_key(world.database, "nope", actor="me")
