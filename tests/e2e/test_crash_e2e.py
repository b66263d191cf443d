"""kill -9 of a real server: acknowledged votes and journaled answers survive, and the routing comes back by itself."""

from __future__ import annotations

import itertools
import sqlite3
import threading
from contextlib import closing

import httpx
import pytest
import sqlalchemy as sa

from scion_adapters import tables
from tests.e2e.conftest import ServerWorld
from tests.helpers.waiting import wait_for

pytestmark = pytest.mark.e2e


class Voter(threading.Thread):
    """Votes as fast as it can until the server is gone; remembers what was acknowledged."""

    def __init__(self, url: str, name: str) -> None:
        super().__init__(daemon=True, name=name)
        self.url = url
        self.acknowledged: list[str] = []

    def run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=60) as client:
            for number in itertools.count():
                body = {"id": f"{self.name}-{number}", "completion_id": "chatcmpl-none", "value": "up"}
                try:
                    response = client.post("/v1/feedback", json=body)
                except httpx.TransportError:
                    return
                if response.status_code in (200, 201):
                    self.acknowledged.append(response.json()["id"])


def test_kill_9_loses_no_vote_no_journaled_answer_and_no_routing(world: ServerWorld) -> None:
    champions = {adapter: world.champion(adapter) for adapter in ("chat", "chat2", "chat3")}
    models = {card["id"]: card["root"] for card in world.client.get("/v1/models").json()["data"]}
    voters = [Voter(world.server.url, f"voter{i}") for i in range(4)]
    for voter in voters:
        voter.start()
    wait_for(lambda: all(len(voter.acknowledged) >= 5 for voter in voters), timeout_s=60, what="votes flow")

    database = world.server.settings.database_url.removeprefix("sqlite:///")
    with closing(sqlite3.connect(database, timeout=30, isolation_level=None)) as blocker:
        blocker.execute("BEGIN IMMEDIATE")  # from here on nothing reaches the database, as if it were gone
        answers = [world.ask("chat").json() for _ in range(3)]
        assert {answer["model"] for answer in answers} == {f"chat:{champions['chat']}"}, "serving goes on without it"
        wait_for(lambda: world.status()["capture"]["journaled"] >= 3, what="answers wait in the journal")
        world.server.kill()
        blocker.execute("ROLLBACK")
    for voter in voters:
        voter.join(70)

    acknowledged = {vote for voter in voters for vote in voter.acknowledged}
    with world.database.read() as connection:
        stored = set(connection.execute(sa.select(tables.feedback.c.id)).scalars())
    assert acknowledged - stored == set()
    assert len(acknowledged) >= 20

    world.server.start()
    for adapter, number in champions.items():  # from the first request on
        response = world.ask(adapter)
        assert (response.status_code, response.json()["model"]) == (200, f"{adapter}:{number}")
    assert {card["id"]: card["root"] for card in world.client.get("/v1/models").json()["data"]} == models
    for answer in answers:
        row = world.completion(answer["id"], timeout_s=30)
        assert row["choices"][0]["message"]["content"] == answer["choices"][0]["message"]["content"]
