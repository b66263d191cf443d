"""Replay on both databases: rows from before the window come back, deleted and held-out ones never do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from scion_adapters import tables
from scion_adapters.database import Database
from scion_feedback.snapshots import Snapshot, build_snapshot
from tests.helpers.feedback import HASHER, Votes, record

WINDOW = 2500.0
NUM_OLD = NUM_NEW = 40


@pytest.fixture
def votes(database: Database) -> Votes:
    """Forty users' votes before the window, and forty other users' in it."""
    votes = Votes(database)
    votes.completions.insert([record(f"c{n}") for n in range(NUM_OLD + NUM_NEW)])
    for n in range(NUM_OLD):
        votes.vote(f"c{n}", value=n % 2, user=f"user-{n}")
    votes.now = WINDOW
    for n in range(NUM_OLD, NUM_OLD + NUM_NEW):
        votes.vote(f"c{n}", value=n % 2, user=f"user-{n}")
    return votes


def build(database: Database, directory: Path, **fields: Any) -> Snapshot:
    common: dict[str, Any] = {"adapter": "chat", "heldout_share": 0.3, "min_ratings": 2, "clock": lambda: 5000.0}
    return build_snapshot(database, directory, **{**common, **fields})


def test_earlier_training_rows_come_back_and_are_in_the_lineage(
    database: Database, votes: Votes, tmp_path: Path
) -> None:
    first = build(database, tmp_path)
    second = build(database, tmp_path, since=WINDOW, replay_share=0.3, seed=3)

    new = [row for row in second.split("train") if not row.replayed]
    replayed = [row for row in second.rows if row.replayed]
    assert len(replayed) == round(len(new) * 0.3 / 0.7) > 0
    assert {row.feedback_id for row in replayed} <= {row.feedback_id for row in first.split("train")}
    assert all(row.created_at < WINDOW for row in replayed)
    assert second.manifest["replay"] == {
        "share": 0.3,
        "seed": 3,
        "rows": len(replayed),
        "from": {first.id: len(replayed)},
    }
    with database.read() as connection:
        query = sa.select(tables.snapshot_rows.c.feedback_id).where(tables.snapshot_rows.c.snapshot_id == second.id)
        assert {row.feedback_id for row in replayed} <= set(connection.execute(query).scalars())
    again = build(database, tmp_path, since=WINDOW, replay_share=0.3, seed=3)
    assert again.id == second.id


def test_deleted_and_replaced_votes_do_not_come_back(database: Database, votes: Votes, tmp_path: Path) -> None:
    first = build(database, tmp_path)
    deleted, replaced, *_ = (row for row in first.split("train") if row.created_at < WINDOW)
    votes.store.delete(deleted.feedback_id, actor="test")
    user = next(f"user-{n}" for n in range(NUM_OLD) if HASHER.hash(f"user-{n}") == replaced.user_hash)
    votes.vote(replaced.completion_id, value=0, user=user)

    second = build(database, tmp_path, since=WINDOW, replay_share=0.9)
    old = {row.feedback_id for row in first.split("train") if row.created_at < WINDOW}
    assert {row.feedback_id for row in second.rows if row.replayed} == old - {
        deleted.feedback_id,
        replaced.feedback_id,
    }


def test_without_a_window_there_is_nothing_to_replay(database: Database, votes: Votes, tmp_path: Path) -> None:
    build(database, tmp_path)
    votes.vote("c0", value=1, user="somebody else")
    snapshot = build(database, tmp_path, replay_share=0.5)
    assert not any(row.replayed for row in snapshot.rows)
    assert snapshot.manifest["replay"]["rows"] == 0


def test_what_the_split_leaves_out_does_not_come_back_as_replayed(
    database: Database, votes: Votes, tmp_path: Path
) -> None:
    build(database, tmp_path, heldout_share=1e-6)  # trains on users that the next one holds out
    for n in range(NUM_OLD + NUM_NEW, 200):
        votes.completions.insert([record(f"c{n}")])
        votes.vote(f"c{n}", value=n % 2, user=f"user-{n}")
    snapshot = build(database, tmp_path, since=1.0, replay_share=0.5)  # every vote is in the window
    assert snapshot.manifest["dropped"]["answer_trained_on"] > 5
    assert snapshot.split("heldout")
    assert not any(row.replayed for row in snapshot.rows)
