"""The feedback routes over HTTP, in vLLM's real application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from scion_adapters import tables
from scion_adapters.errors import UnavailableError
from scion_feedback.feedback import FeedbackStore
from tests.helpers.plugin_world import PluginWorld
from vllm_scion.routes_feedback import MAX_BODY_BYTES


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[PluginWorld]:
    world = PluginWorld(tmp_path)
    yield world
    world.close()


@pytest.fixture
async def client(world: PluginWorld) -> AsyncIterator[httpx.AsyncClient]:
    async with world.serving() as client:
        yield client


def rows(world: PluginWorld) -> int:
    with world.database.read() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(tables.feedback)).scalar_one())


async def vote(client: httpx.AsyncClient, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    return await client.post(
        "/v1/feedback", json={"completion_id": "chatcmpl-1", "value": "up", **body}, headers=headers
    )


async def test_a_vote_is_created_read_listed_and_taken_back(client: httpx.AsyncClient, world: PluginWorld) -> None:
    created = await vote(client, user="ann", comment="nice")
    assert created.status_code == 201
    row = created.json()
    assert (row["object"], row["value"], row["comment"], row["counts"]) == ("feedback", 1.0, "nice", True)
    assert row["completion_known"] is False  # its record may still be on its way
    assert "ann" not in created.text

    read = (await client.get(f"/v1/feedback/{row['id']}")).json()
    assert read == {key: value for key, value in row.items() if key != "completion_known"}
    listed = (await client.get("/v1/feedback", params={"completion_id": "chatcmpl-1"})).json()
    assert (listed["object"], listed["data"]) == ("list", [read])

    deleted = await client.delete(f"/v1/feedback/{row['id']}")
    assert (deleted.status_code, deleted.json()["deleted"]) == (200, True)
    for again in (client.get, client.delete):
        response = await again(f"/v1/feedback/{row['id']}")
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "not_found"
    assert (await client.get("/v1/feedback", params={"completion_id": "chatcmpl-1"})).json()["data"] == []


@pytest.mark.parametrize(
    ("first", "second", "status", "num_rows"),
    [
        # the same id and body: a safe retry
        ({"id": "mine"}, {"id": "mine"}, 200, 1),
        # the same id, another body
        ({"id": "mine"}, {"id": "mine", "value": "down"}, 409, 1),
        # the same with the header
        ({"headers": {"Idempotency-Key": "k"}}, {"headers": {"Idempotency-Key": "k"}}, 200, 1),
        ({"headers": {"Idempotency-Key": "k"}}, {"headers": {"Idempotency-Key": "k"}, "comment": "x"}, 409, 1),
        # without either, every request is a vote
        ({}, {}, 201, 2),
    ],
)
async def test_retries(
    client: httpx.AsyncClient,
    world: PluginWorld,
    first: dict[str, Any],
    second: dict[str, Any],
    status: int,
    num_rows: int,
) -> None:
    created = await vote(client, **first)
    assert created.status_code == 201
    response = await vote(client, **second)
    assert response.status_code == status, response.text
    if status == 200:
        assert response.json() == created.json()
    if status == 409:
        assert response.json()["error"]["code"] == "conflict"
    assert rows(world) == num_rows


async def test_the_same_retry_many_times_at_once_makes_one_row(client: httpx.AsyncClient, world: PluginWorld) -> None:
    answers = await asyncio.gather(*(vote(client, id="mine") for _ in range(12)))
    assert sorted(a.status_code for a in answers) == [200] * 11 + [201]
    assert len({a.json()["created_at"] for a in answers}) == 1
    assert rows(world) == 1


@pytest.mark.parametrize(
    ("content", "status", "param"),
    [
        (b'{"value": "up"}', 400, "completion_id"),  # what is rated?
        (b'{"completion_id": "c"}', 400, "value"),  # nothing said
        (b'{"completion_id": "c", "value": "sideways"}', 400, "value"),
        (b'{"completion_id": "c", "value": 3}', 400, "value"),
        (b'{"completion_id": "c", "value": 1, "metadata": []}', 400, "metadata"),
        (b'{"completion_id": "c", "value": 1, "vlaue": 1}', 400, "vlaue"),  # a typo is not dropped silently
        (b'{"completion_id": "c", "value": 1, "comment": "\\u0000"}', 400, "comment"),
        (b"[]", 400, None),
        (b"{", 400, None),
        (b"", 400, None),
        (b"\xff", 400, None),  # not UTF-8
        (b"[" * 100_000, 400, None),  # deeper than a parser goes
        (b" " * (MAX_BODY_BYTES + 1), 413, None),
    ],
)
async def test_bad_input_names_the_field_in_openais_shape(
    client: httpx.AsyncClient, world: PluginWorld, content: bytes, status: int, param: str | None
) -> None:
    response = await client.post("/v1/feedback", content=content)
    assert response.status_code == status
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert rows(world) == 0


async def test_a_body_that_never_ends_is_not_read_on(client: httpx.AsyncClient) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield b" " * 65_536
        raise AssertionError("read to the end")

    response = await client.post("/v1/feedback", content=endless())
    assert response.status_code == 413


async def test_an_unusable_idempotency_key_is_named(client: httpx.AsyncClient) -> None:
    response = await vote(client, headers={"Idempotency-Key": "x" * 300})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "Idempotency-Key")


async def test_listing_needs_a_completion(client: httpx.AsyncClient) -> None:
    response = await client.get("/v1/feedback")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "completion_id")


@pytest.mark.parametrize(
    ("failure", "status", "kind"),
    [
        (UnavailableError("the database does not answer"), 503, "service_unavailable"),
        (OSError("No space left on device"), 500, "server_error"),
    ],
)
async def test_what_could_not_be_stored_is_never_acknowledged(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, failure: Exception, status: int, kind: str
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise failure

    monkeypatch.setattr(FeedbackStore, "add", fail)
    response = await vote(client)
    assert (response.status_code, response.json()["error"]["type"]) == (status, kind)
    assert response.headers.get("retry-after") == ("1" if status == 503 else None)


async def test_votes_are_counted_by_outcome(client: httpx.AsyncClient, world: PluginWorld) -> None:
    await vote(client, id="mine")
    await vote(client, id="mine")
    await vote(client, id="mine", value="down")
    await client.post("/v1/feedback", content=b"{")
    await client.delete("/v1/feedback/mine")
    outcomes = world.last_plugin.gateway.metrics["scion_feedback_total"]
    for outcome in ("created", "repeated", "conflict", "invalid", "deleted"):
        assert outcomes.labels(outcome)._value.get() == 1.0, outcome
