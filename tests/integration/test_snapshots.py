"""Snapshots and lineage, on both databases: what is frozen, that it is found again, and who is in which version."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from scion_adapters import tables
from scion_adapters.database import Database
from scion_adapters.errors import InvalidInputError, NotFoundError, RejectedError
from scion_adapters.records import VersionRef
from scion_feedback.lineage import feedback_of_version, versions_of_user
from scion_feedback.snapshots import Snapshot, build_snapshot, find_snapshot, load_snapshot, new_ratings_since
from tests.helpers.feedback import HASHER, Votes, choice, record

NUM_USERS = 30


@pytest.fixture
def votes(database: Database) -> Votes:
    """Thirty users, one thumb each about `chat:1`, every third one down; one vote about another adapter."""
    votes = Votes(database)
    votes.completions.insert([record(f"c{n}") for n in range(NUM_USERS)] + [record("other", adapter="b")])
    for n in range(NUM_USERS):
        votes.vote(f"c{n}", value=n % 3 != 0, user=f"user-{n}")
    votes.vote("other", value=1, user="user-0")
    return votes


def _build(database: Database, directory: Path, **fields: Any) -> Snapshot:
    defaults: dict[str, Any] = {
        "adapter": "chat",
        "heldout_share": 0.3,
        "min_ratings": 2,
        "clock": lambda: 5000.0,
    }
    return build_snapshot(database, directory, **{**defaults, **fields})


def _lineage(database: Database, snapshot_id: str) -> dict[str, str]:
    with database.read() as connection:
        query = sa.select(tables.snapshot_rows).where(tables.snapshot_rows.c.snapshot_id == snapshot_id)
        return {row.feedback_id: row.split for row in connection.execute(query)}


def test_snapshot_holds_what_users_said(database: Database, votes: Votes, tmp_path: Path) -> None:
    correction = votes.vote("c1", correction="better", user="user-1")
    votes.vote("c2", comment="only words", user="user-2")
    snapshot = _build(database, tmp_path)
    assert len(snapshot.rows) == NUM_USERS + 1
    first = snapshot.rows[0]
    assert first.messages == [{"role": "user", "content": "question of c0"}]
    assert (first.answer, first.liked, first.number) == ("answer of c0", False, 1)
    assert first.user_hash == HASHER.hash("user-0")
    assert snapshot.rows[-1].feedback_id == correction.id  # in order of arrival
    assert snapshot.rows[-1].correction == "better"
    manifest = snapshot.manifest
    assert manifest["counts"] == {
        "rows": 31,
        "train": len(snapshot.split("train")),
        "heldout": len(snapshot.split("heldout")),
        "newest": 0,
        "liked": 20,
        "disliked": 10,
        "red_team": 0,
        "corrections": 1,
        "users": 30,
    }
    assert 0 < len(snapshot.split("heldout")) < 16
    assert manifest["split"] == {"by": "user", "heldout_share": 0.3, "newest_share": 0.0}
    assert manifest["versions"] == {"1": 31}
    assert manifest["dropped"] == {"comment_only": 1, "other_adapter": 1}
    assert "user-1" not in (snapshot.path / "rows.jsonl").read_text()


def test_same_votes_make_the_same_snapshot(database: Database, votes: Votes, tmp_path: Path) -> None:
    first = _build(database, tmp_path / "a")
    again = _build(database, tmp_path / "a", clock=lambda: 6000.0)
    elsewhere = _build(database, tmp_path / "b")
    assert first.id == again.id == elsewhere.id
    assert again == first  # the manifest that was written first stays
    assert [path.name for path in (tmp_path / "a").iterdir()] == [first.id.removeprefix("sha256:")]
    votes.vote("c3", value=0, user="late")
    assert _build(database, tmp_path / "a").id != first.id
    assert load_snapshot(first.path) == first  # frozen


def test_lineage_is_recorded_once_and_repaired_after_a_crash(database: Database, votes: Votes, tmp_path: Path) -> None:
    snapshot = _build(database, tmp_path)
    expected = {row.feedback_id: row.split for row in snapshot.rows}
    assert _lineage(database, snapshot.id) == expected
    with database.write() as connection:  # as if killed between the files and the transaction
        connection.execute(sa.delete(tables.snapshot_rows))
        connection.execute(sa.delete(tables.snapshots))
    _build(database, tmp_path)
    assert _lineage(database, snapshot.id) == expected


def test_what_is_left_out_and_why(database: Database, votes: Votes, tmp_path: Path) -> None:
    votes.completions.insert(
        [
            record("cut", choices=[choice("cut off", finish_reason="length")]),
            record("tools", choices=[choice(None, tool_calls=[{"id": "t"}])]),
            record("bare", route="completions", request={"prompt": "once"}, choices=[{"index": 0, "text": "upon"}]),
        ]
    )
    for completion_id in ("cut", "tools", "bare", "nowhere"):
        votes.vote(completion_id, value=1)
    votes.vote("c0", value=1, user="user-0")  # changed their mind
    votes.vote("c1", value=0.5, user="user-1")  # replaced by a neutral vote
    votes.store.delete(votes.vote("c2", value=1, user="bob").id, actor="tester")
    assert _build(database, tmp_path).manifest["dropped"] == {
        "deleted": 1,
        "neutral_value": 1,
        "not_chat": 1,
        "other_adapter": 1,
        "superseded": 2,
        "tool_calls": 1,
        "truncated_answer": 1,
        "unknown_completion": 1,
    }


def test_a_replaced_correction_does_not_return_when_its_successor_is_deleted(
    database: Database, votes: Votes, tmp_path: Path
) -> None:
    votes.vote("c1", correction="old", user="user-1")
    new = votes.vote("c1", correction="new", user="user-1")
    thumb = votes.vote("c2", value=1, user="bob")
    votes.vote("c2", correction="kept", user="bob")
    assert _corrections(_build(database, tmp_path)) == {"new", "kept"}
    votes.store.delete(new.id, actor="tester")
    votes.store.delete(thumb.id, actor="tester")  # no correction was replaced with it
    votes.store.delete(votes.vote("c2", value=0, user="bob").id, actor="tester")
    assert _corrections(_build(database, tmp_path)) == {"kept"}
    assert [row.correction for row in votes.store.for_completion("c1")] == [None, "old"]
    assert [row.row.correction for row in votes.store.export("chat") if row.row.correction is not None] == [
        "old",
        "kept",
    ]


def _corrections(snapshot: Snapshot) -> set[str]:
    return {row.correction for row in snapshot.rows if row.correction is not None}


def test_what_was_held_out_is_never_trained_on_as_users_join(database: Database, tmp_path: Path) -> None:
    votes = Votes(database)
    learned: set[str] = set()
    judged: set[str] = set()
    rules = []
    for users in (range(3), range(3, 40), range(40, 60)):
        for user in users:
            num = 20 if user < 3 else 3
            votes.completions.insert([record(f"c{user}-{n}") for n in range(num)])
            for n in range(num):
                votes.vote(f"c{user}-{n}", value=n % 2, user=f"user-{user}")
            votes.vote("c0-0", value=1, user=f"user-{user}")  # everyone likes that one
        snapshot = _build(database, tmp_path, heldout_share=0.15, newest_share=0.05)
        rules.append(snapshot.manifest["split"]["by"])
        learned |= {row.completion_id for row in snapshot.split("train")}
        judged |= {row.completion_id for row in snapshot.split("heldout")}
        assert not learned & judged
        assert len(snapshot.split("heldout")) >= 5
        counts = snapshot.manifest["counts"]
        assert counts["train"] > 0.6 * counts["rows"]
        assert _build(database, tmp_path, heldout_share=0.15, newest_share=0.05).id == snapshot.id
    assert rules == ["completion", "user", "user"]
    assert snapshot.manifest["dropped"]["answer_held_out"] > 0


@pytest.mark.parametrize(
    ("fields", "num_rows"),
    [
        ({"since": 2021.0}, 10),  # votes were cast at 2001, 2002, … 2030
        ({"max_age_days": (5000.0 - 2026.0) / 86400}, 5),
        ({"since": 2021.0, "max_age_days": 1.0}, 10),  # the stricter one holds
        ({"max_age_days": 1.0}, 30),
    ],
)
def test_old_votes_are_left_out(
    database: Database, votes: Votes, tmp_path: Path, fields: dict[str, Any], num_rows: int
) -> None:
    snapshot = _build(database, tmp_path, **fields)
    assert len(snapshot.rows) == num_rows
    assert snapshot.manifest["dropped"].get("too_old", 0) == 30 - num_rows


def test_too_few_ratings_say_how_many_and_why(database: Database, votes: Votes, tmp_path: Path) -> None:
    votes.vote("c0", comment="words", user="bob")
    with pytest.raises(InvalidInputError) as caught:
        _build(database, tmp_path, min_ratings=31)
    message = str(caught.value)
    for part in ("30 usable ratings of 'chat'", "31 are needed", "1 comment_only", "lower trainer.min_ratings"):
        assert part in message
    assert caught.value.field == "trainer.min_ratings"
    assert list(tmp_path.glob("*/rows.jsonl")) == []


def test_text_of_every_alphabet_survives(database: Database, tmp_path: Path) -> None:
    # U+2028, U+0085 and friends are line ends to some readers.
    text = 'a\u2028b\x85c\x0bd\r\ne 🙂 \\ " naïve'
    votes = Votes(database)
    votes.completions.insert([record(f"c{n}", choices=[choice(text)]) for n in range(4)])
    for n in range(4):
        votes.vote(f"c{n}", value=1, user=f"user-{n}")
    snapshot = _build(database, tmp_path)
    assert {row.answer for row in load_snapshot(snapshot.path).rows} == {text}


@pytest.mark.parametrize(
    ("harm", "error", "says"),
    [
        (lambda path: (path / "rows.jsonl").unlink(), NotFoundError, "rows.jsonl does not exist"),
        (lambda path: (path / "manifest.json").unlink(), NotFoundError, "manifest.json does not exist"),
        (lambda path: (path / "manifest.json").write_text("{"), RejectedError, "damaged"),
        (lambda path: _replace(path / "rows.jsonl", b'"liked": false', b'"liked": true'), RejectedError, "digest"),
        (lambda path: (path / "rows.jsonl").write_bytes(b""), RejectedError, "digest"),
        (lambda path: _replace(path / "manifest.json", b'"format": 1', b'"format": 2'), RejectedError, "format 2"),
    ],
)
def test_damage_is_noticed(
    database: Database, votes: Votes, tmp_path: Path, harm: Any, error: type[Exception], says: str
) -> None:
    snapshot = _build(database, tmp_path)
    harm(snapshot.path)
    with pytest.raises(error, match=says):
        load_snapshot(snapshot.path)


def _replace(file: Path, old: bytes, new: bytes) -> None:
    data = file.read_bytes()
    assert old in data
    file.write_bytes(data.replace(old, new, 1))


def test_find_snapshot(database: Database, votes: Votes, tmp_path: Path) -> None:
    snapshot = _build(database, tmp_path)
    digest = snapshot.id.removeprefix("sha256:")
    for text in (snapshot.id, digest, digest[:8]):
        found = find_snapshot(database, text)
        assert (found.id, found.path, found.adapter) == (snapshot.id, snapshot.path, "chat")
        assert json.dumps(found.manifest, sort_keys=True) == json.dumps(dict(snapshot.manifest), sort_keys=True)
    votes.vote("c3", value=0, user="late")
    _build(database, tmp_path)
    with pytest.raises(InvalidInputError, match="give more digits"):
        find_snapshot(database, "")
    for nothing in ("0" * 64, "%", "_"):
        with pytest.raises(NotFoundError, match="scion dataset build"):
            find_snapshot(database, nothing)


def test_new_ratings(database: Database, votes: Votes) -> None:
    assert new_ratings_since(database, "chat", 0.0) == 30
    assert new_ratings_since(database, "chat", 2030.0) == 0
    assert new_ratings_since(database, "b", 0.0) == 1
    start = votes.now
    votes.vote("c0", value=1, user="user-0")
    votes.vote("c0", value=0, user="user-0")  # the same user again: one vote
    votes.vote("c1", correction="better", user="user-1")
    votes.vote("c1", comment="words", user="user-1")
    votes.vote("c2", value=1, user="joe", name="helpful")
    votes.store.delete(votes.vote("c4", value=1, user="joe").id, actor="tester")
    votes.vote("nowhere", value=1)
    assert new_ratings_since(database, "chat", start) == 2


def _publish(database: Database, number: int, parent: int, snapshot: Snapshot | None) -> None:
    values = {
        "adapter": "chat", "number": number, "lora_id": number, "digest": f"sha256:{number}", "state": "accepted",
        "parent": parent, "base_fingerprint": "", "metrics": {}, "rank": 1, "size_bytes": 1, "evaluation_key": "",
        "snapshot_id": None if snapshot is None else snapshot.id, "created_at": 0.0, "created_by": "tester",
    }  # fmt: skip
    with database.write() as connection:
        connection.execute(sa.insert(tables.versions).values(**values))


def test_invariant_8_both_ways(database: Database, votes: Votes, tmp_path: Path) -> None:
    """From a version to the votes that made it, from a user to the versions trained on their data."""
    with database.write() as connection:
        connection.execute(sa.insert(tables.adapters).values(name="chat", created_at=0.0))
    early = _build(database, tmp_path)
    late_row = votes.vote("c3", value=0, user="late")
    late = _build(database, tmp_path, since=late_row.created_at - 0.5, min_ratings=1)
    assert [row.feedback_id for row in late.rows] == [late_row.id]
    late_split = late.rows[0].split
    _publish(database, 1, 0, early)
    _publish(database, 2, 1, late)  # trained further from 1
    _publish(database, 3, 0, None)  # imported
    one, two, three = (VersionRef("chat", n) for n in (1, 2, 3))

    rows = feedback_of_version(database, one)
    assert {row.feedback_id: row.split for row in rows} == {row.feedback_id: row.split for row in early.rows}
    assert {row.version for row in rows} == {one}
    assert [row.feedback_id for row in feedback_of_version(database, two)] == [late_row.id]
    assert len(feedback_of_version(database, two, inherited=True)) == 31
    assert feedback_of_version(database, three) == []
    with pytest.raises(NotFoundError, match="chat:9"):
        feedback_of_version(database, VersionRef("chat", 9))

    learned = early.split("train")[0].user_hash
    judged = early.split("heldout")[0].user_hash
    assert learned is not None
    assert judged is not None
    assert versions_of_user(database, learned) == [one]
    assert versions_of_user(database, learned, inherited=True) == [one, two]
    assert versions_of_user(database, judged) == []  # only used to judge, nothing was learned from it
    assert versions_of_user(database, HASHER.hash("late")) == ([two] if late_split == "train" else [])
    assert versions_of_user(database, "nobody", inherited=True) == []
