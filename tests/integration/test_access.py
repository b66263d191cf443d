"""Keys on vLLM's real application: who gets in, on both databases, and that no secret is written anywhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from scion_adapters.database import Database
from scion_adapters.errors import NotFoundError, UnavailableError
from scion_adapters.events import list_events
from scion_adapters.keys import Scope, create_key, list_keys, load_key_ring, revoke_key
from scion_adapters.records import Event
from tests.helpers.access import CHAT, bearer, server_log, status
from tests.helpers.plugin_world import PluginWorld
from tests.helpers.waiting import until

CLIENTS = {"httpx", "httpcore"}
"""They log what they ask, which is not the server's doing."""


@pytest.fixture(params=["sqlite", "postgresql"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PluginWorld]:
    url = request.getfixturevalue("postgres_database").url if request.param == "postgresql" else None
    world = PluginWorld(tmp_path, url=url)
    yield world
    world.close()


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with server_log(caplog):
        yield caplog


def refusals(world: PluginWorld) -> list[Event]:
    return [event for event in list_events(world.database, limit=1000) if event.kind == "access.refused"]


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
    world: PluginWorld, log: pytest.LogCaptureFixture
) -> None:
    key, chat = create_key(world.database, "shop", Scope.CHAT, actor="me")
    secret = chat.removeprefix(f"sk-scion-{key.id}-")
    wrong = chat[:-3] + "xyz"
    answers = []
    async with world.serving() as client:
        for plain in (wrong, wrong, chat):
            answers.append(await client.get("/v1/scion/status", headers=bearer(plain)))
        answers.append(await client.post(f"/v1/{chat}/x?key={chat}", headers={"x-api-key": wrong}))
        await until(lambda: {event.data["reason"] for event in refusals(world)} == {"unknown", "scope"})
        revoke_key(world.database, key.id, actor="me")
        await until(lambda: world.last_plugin.gatekeeper.ring.keys[key.id].revoked_at is not None)
        answers.append(await client.post("/v1/chat/completions", json=CHAT, headers=bearer(chat)))
        metrics = (await client.get("/metrics")).text
    counts = world.last_plugin.gateway.metrics["scion_access_refused_total"]
    assert {r: counts.labels(r)._value.get() for r in ("missing", "unknown", "revoked", "scope")} == {
        "missing": 0,
        "unknown": 3,
        "revoked": 1,
        "scope": 1,
    }
    seen: Counter[tuple[object, ...]] = Counter()
    for event in refusals(world):
        seen[tuple(event.data[name] for name in ("reason", "path", "key_id"))] += event.data["count"]
    assert seen == {
        ("unknown", "/v1/scion/…", key.id): 2,
        ("scope", "/v1/scion/…", key.id): 1,
        ("unknown", "/v1/*/…", key.id): 1,
        ("revoked", "/v1/chat/…", key.id): 1,
    }
    assert {event.data["client"] for event in refusals(world)} == {"127.0.0.1"}
    logged = "\n".join(record.getMessage() for record in log.records if record.name.partition(".")[0] not in CLIENTS)
    assert "Endpoint plugin overrides" in logged, "nothing was listened to"
    stored = repr(list_events(world.database, limit=1000)) + repr(list_keys(world.database))
    ring = repr(load_key_ring(world.database)) + repr(world.last_plugin.gatekeeper)
    for text in (stored, logged, metrics, ring, *(answer.text + repr(answer.headers) for answer in answers)):
        assert secret not in text
        assert wrong not in text


async def test_strange_paths_do_not_keep_refusals_from_being_written(world: PluginWorld) -> None:
    create_key(world.database, "shop", Scope.CHAT, actor="me")
    async with world.serving() as client:
        for path in ("/v1/a%00b", "/v1/%ff%fe", "/%F0%9F%92%A9/%1b%5B2J", "/v1/models"):
            assert (await client.get(path)).status_code == 401
        await until(lambda: sum(event.data["count"] for event in refusals(world)) == 4)
    assert {event.data["path"] for event in refusals(world)} == {"/v1/*", "/*/*", "/v1/models"}


async def test_the_last_keys_stay_in_force_while_the_database_is_gone(
    world: PluginWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, chat = create_key(world.database, "shop", Scope.CHAT, actor="me")

    def gone(_: Database) -> NoReturn:
        raise UnavailableError("the database does not answer")

    async with world.serving() as client:
        errors = world.last_plugin.gateway.metrics["scion_database_errors_total"].labels("refusals")
        with monkeypatch.context() as broken:
            broken.setattr(Database, "read", gone)
            broken.setattr(Database, "write", gone)
            seen = [await status(client, "/v1/chat/completions", plain) for plain in (None, chat[:-1], chat)]
            assert seen == [401, 401, 200]
            await until(lambda: errors._value.get() > 0)
            assert [await status(client, "/v1/models", plain) for plain in (None, chat)] == [401, 200]
        revoke_key(world.database, key.id, actor="me")
        await until(lambda: world.last_plugin.gatekeeper.ring.check(chat) is None)
        assert await status(client, "/v1/models", chat) == 401


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
