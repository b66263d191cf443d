"""SIGTERM of a real server in the middle of its answers: they end whole, and all that it said is recorded."""

from __future__ import annotations

import threading
from pathlib import Path

import httpx
import pytest
import sqlalchemy as sa

from scion_adapters import tables
from scion_adapters.database import open_database
from tests.helpers.serving import Server
from tests.helpers.waiting import wait_for

pytestmark = pytest.mark.e2e

NUM_STREAMS = 8
BODY = {"model": "chat", "prompt": "Paris is", "max_tokens": 200, "ignore_eos": True, "stream": True}


class Reader(threading.Thread):
    """Reads one stream to its end."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url = url
        self.text = ""
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            with httpx.stream("POST", f"{self.url}/v1/completions", json=BODY, timeout=60) as response:
                response.raise_for_status()
                for piece in response.iter_text():
                    self.text += piece
        except (httpx.HTTPError, httpx.StreamError) as error:
            self.error = error


@pytest.mark.parametrize("num_processes", [1, 2])
def test_answers_end_whole_and_are_recorded(tmp_path: Path, num_processes: int) -> None:
    server = Server.make(tmp_path, config={"server": {"api_server_count": num_processes, "shutdown_timeout_s": 60}})
    with server:
        readers = [Reader(server.url) for _ in range(NUM_STREAMS)]
        for reader in readers:
            reader.start()
        wait_for(lambda: all(reader.text.count("data:") >= 3 for reader in readers), "every answer has begun")
        assert not any("[DONE]" in reader.text for reader in readers), "too short to be interrupted"
        server.stop(timeout_s=90)  # a machine that is busy otherwise is slow
        for reader in readers:
            reader.join(60)
    assert [reader.error for reader in readers] == [None] * NUM_STREAMS
    assert all(reader.text.rstrip().endswith("data: [DONE]") for reader in readers)
    database = open_database(server.settings)
    with database.read() as connection:
        rows = connection.execute(sa.select(tables.completions.c.finish_reason, tables.completions.c.completion_tokens))
        recorded = [tuple(row) for row in rows]
    database.dispose()
    assert recorded == [("length", 200)] * NUM_STREAMS
