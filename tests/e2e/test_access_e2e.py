"""Keys on a real server with two API server processes: each of them closes and refuses, and streams still stream."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from scion_adapters.database import Database, open_database
from scion_adapters.events import list_events
from scion_adapters.keys import Scope, create_key, revoke_key
from scion_adapters.records import Event
from tests.helpers.access import bearer
from tests.helpers.serving import Server
from tests.helpers.waiting import wait_for

pytestmark = pytest.mark.e2e

AGREED_S = 5.0
"""A second on an idle machine, which the swap benchmark holds to; here other tests may share the cores."""
NUM_REQUESTS = 24
"""On connections of their own: that one of two processes gets none of them is rarer than this test is run."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server.make(tmp_path, config={"server": {"api_server_count": 2}}) as server:
        yield server


@pytest.fixture
def database(server: Server) -> Iterator[Database]:
    database = open_database(server.settings)
    yield database
    database.dispose()


def statuses(server: Server, path: str, plain: str | None = None) -> set[int]:
    """Of many requests, so that every process has answered some."""
    headers = bearer(plain) if plain else {}
    return {httpx.get(f"{server.url}{path}", headers=headers).status_code for _ in range(NUM_REQUESTS)}


def seconds_until(server: Server, path: str, plain: str | None, status: int) -> float:
    started = time.monotonic()
    wait_for(lambda: statuses(server, path, plain) == {status}, poll_s=0.0, what=f"{path} answers {status}")
    return time.monotonic() - started


def test_a_key_closes_all_processes_and_its_end_reaches_them_all(server: Server, database: Database) -> None:
    assert statuses(server, "/v1/models") == {200}
    key, chat = create_key(database, "shop", Scope.CHAT, actor="test")
    assert seconds_until(server, "/v1/models", None, 401) < AGREED_S
    assert statuses(server, "/v1/models", chat) == {200}
    assert statuses(server, "/v1/scion/status", chat) == {403}
    assert statuses(server, "/health") == {200}

    body = {"model": "chat", "prompt": "Paris is", "max_tokens": 24, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=bearer(chat), timeout=60) as response:
        assert response.status_code == 200
        pieces = list(response.iter_raw())
    assert len(pieces) > 5, "the answer came in one piece"
    assert b"[DONE]" in pieces[-1]
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        httpx.post(f"{server.url}/v1/completions", json=body).raise_for_status()

    revoke_key(database, key.id, actor="test")
    assert seconds_until(server, "/v1/models", chat, 401) < AGREED_S

    def refused() -> list[Event]:
        return [event for event in list_events(database, limit=1000) if event.kind == "access.refused"]

    wait_for(lambda: {e.data["reason"] for e in refused()} == {"missing", "scope", "revoked"}, "every refusal is told")
    server.stop()  # the counts that are not written yet are
    assert sum(event.data["count"] for event in refused() if event.data["reason"] == "scope") == NUM_REQUESTS
    secret = chat.removeprefix(f"sk-scion-{key.id}-")
    assert secret not in server.log.read_text(errors="replace")
    assert secret not in repr(list_events(database, limit=1000))
