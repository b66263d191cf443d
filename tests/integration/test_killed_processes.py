"""kill -9 of real processes: what was acknowledged is there, what was journaled arrives exactly once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import sqlalchemy as sa

from scion_adapters.database import Database
from scion_adapters.tables import completions, feedback
from scion_feedback.captures import CompletionStore
from scion_feedback.journal import Journal
from scion_feedback.recorder import Recorder
from tests.helpers.victims import Victim
from tests.helpers.waiting import wait_for


def _ids(url: str, table: sa.Table) -> list[str]:
    database = Database(url)
    with database.read() as connection:
        ids = list(connection.execute(sa.select(table.c.id)).scalars())
    database.dispose()
    return ids


@pytest.mark.parametrize("seed", [1, 2])
def test_acknowledged_votes_survive(database: Database, seed: int) -> None:
    victim = Victim("votes", database.url)
    acknowledged = victim.kill_after(random.Random(seed).randint(20, 150))
    stored = _ids(database.url, feedback)
    assert set(acknowledged) <= set(stored)
    assert len(stored) <= len(acknowledged) + 1  # at most the one that was committed and not answered yet


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_journaled_answers_arrive_exactly_once(database: Database, tmp_path: Path, seed: int) -> None:
    directory = tmp_path / "journal"
    victim = Victim("records", database.url, str(directory))
    wait_for(lambda: list(directory.glob("*.jsonl")) if directory.exists() else [], timeout_s=60)
    neighbour = Journal(directory, 1 << 20)
    assert neighbour.adopt() == 0  # the program lives
    neighbour.close()
    journaled = victim.kill_after(random.Random(seed).randint(50, 2000))
    before = len(_ids(database.url, completions))

    recorder = Recorder(CompletionStore(database), Journal(directory, 1 << 30), queue_size=1, flush_interval_s=0.01)
    recorder.start()
    assert recorder.close(timeout_s=60)  # even a process that closes at once takes over what was left
    stored = _ids(database.url, completions)
    assert set(journaled) <= set(stored)
    assert len(stored) == len(set(stored)) == before + recorder.stats().stored
    assert recorder.stats().conflicting == 0
    assert recorder.stats().lost.get("corrupt_journal", 0) <= 1  # at most the line that was being written
    assert list(directory.iterdir()) == []
