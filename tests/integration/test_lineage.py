"""Votes behind a version that only taught the reward model of its run: lineage has them in both directions."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from scion_adapters import tables
from scion_adapters.database import Database
from scion_adapters.records import VersionRef
from scion_feedback.lineage import REWARD_RUN_METRIC, feedback_of_version, versions_of_user

PPO, LATER = VersionRef("chat", 1), VersionRef("chat", 2)


def _run(run_id: str, snapshot: str, **metrics: Any) -> dict[str, Any]:
    return {
        "id": run_id, "adapter": "chat", "recipe": "ppo", "state": "succeeded", "parent": 0, "snapshot_id": snapshot,
        "config": {}, "metrics": metrics, "directory": "", "attempt": 1, "actor": "tester", "created_at": 0.0,
        "updated_at": 0.0,
    }  # fmt: skip


def _version(number: int, parent: int, run_id: str, snapshot: str) -> dict[str, Any]:
    return {
        "adapter": "chat", "number": number, "lora_id": number, "digest": f"sha256:{number}", "state": "accepted",
        "parent": parent, "base_fingerprint": "", "metrics": {}, "rank": 1, "size_bytes": 1, "evaluation_key": "",
        "snapshot_id": snapshot, "run_id": run_id, "created_at": 0.0, "created_by": "tester",
    }  # fmt: skip


def _row(snapshot: str, vote: str, user: str, split: str) -> dict[str, Any]:
    return {
        "snapshot_id": snapshot, "feedback_id": vote, "completion_id": f"c-{vote}", "user_hash": user, "split": split,
    }  # fmt: skip


def fill(database: Database) -> None:
    """A reward model from January's votes, a PPO version from March's, and one trained further from that."""
    with database.write() as connection:
        connection.execute(sa.insert(tables.adapters).values(name="chat", created_at=0.0))
        for snapshot in ("january", "march", "april"):
            values = {"id": snapshot, "adapter": "chat", "path": "", "manifest": {}, "created_at": 0.0}
            connection.execute(sa.insert(tables.snapshots).values(values))
        rows = [
            _row("january", "v1", "ann", "train"),
            _row("january", "v2", "bob", "heldout"),
            _row("march", "v3", "cid", "train"),
            _row("april", "v4", "dan", "train"),
        ]
        connection.execute(sa.insert(tables.snapshot_rows), rows)
        runs = [
            _run("run-reward", "january"),
            _run("run-ppo", "march", **{REWARD_RUN_METRIC: "run-reward"}),
            _run("run-kto", "april"),
        ]
        connection.execute(sa.insert(tables.runs), runs)
        versions = [_version(1, 0, "run-ppo", "march"), _version(2, 1, "run-kto", "april")]
        connection.execute(sa.insert(tables.versions), versions)


def test_a_version_has_the_votes_that_taught_its_reward_model(database: Database) -> None:
    fill(database)
    found = [(row.feedback_id, row.split, row.version) for row in feedback_of_version(database, PPO)]
    assert found == [("v3", "train", PPO), ("v1", "reward", PPO)]  # bob only judged the reward model
    assert [row.feedback_id for row in feedback_of_version(database, LATER)] == ["v4"]
    inherited = feedback_of_version(database, LATER, inherited=True)
    assert [row.feedback_id for row in inherited] == ["v4", "v3", "v1"]


def test_a_user_has_the_versions_whose_reward_model_learned_from_them(database: Database) -> None:
    fill(database)
    assert versions_of_user(database, "ann") == [PPO]
    assert versions_of_user(database, "ann", inherited=True) == [PPO, LATER]
    assert versions_of_user(database, "bob") == []
    assert versions_of_user(database, "dan") == [LATER]
