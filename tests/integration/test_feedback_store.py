"""Votes, on both databases: idempotency, concurrency, which votes count, deletion, figures, export."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import sqlalchemy as sa

from scion_adapters.database import Database
from scion_adapters.errors import ConflictError, NotFoundError
from scion_adapters.events import list_events
from scion_adapters.tables import feedback
from scion_feedback.feedback import AddResult, FeedbackRow, FeedbackStore, parse_feedback
from tests.helpers.feedback import HASHER, Votes, record


@pytest.fixture
def votes(database: Database) -> Votes:
    votes = Votes(database)
    votes.completions.insert(
        [
            record("c", user_hash=HASHER.hash("alice")),
            record("anonymous"),
            record("d", number=2),
            record("e", adapter="b"),
        ]
    )
    return votes


def _counting(votes: Votes, completion_id: str) -> list[float | None]:
    return [row.value for row in votes.store.for_completion(completion_id) if row.counts]


def _rows(database: Database) -> int:
    with database.read() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(feedback)).scalar_one())


def test_round_trip(votes: Votes) -> None:
    body = {
        "completion_id": "c",
        "choice_index": 1,
        "name": "rating",
        "value": "up",
        "comment": "naïve 🙂",
        "correction": "better",
        "user": "alice",
        "metadata": {"page": 3, "tags": ["a"]},
        "id": "my-id",
    }
    result = votes.store.add(parse_feedback(body))
    assert result.created
    assert result.completion_known
    assert votes.store.get("my-id") == result.row
    assert result.row.to_json() == {
        "id": "my-id",
        "object": "feedback",
        "created_at": 2001,
        "completion_id": "c",
        "choice_index": 1,
        "name": "rating",
        "value": 1.0,
        "comment": "naïve 🙂",
        "correction": "better",
        "metadata": {"page": 3, "tags": ["a"]},
        "counts": True,
    }


def test_users_are_stored_as_hashes_only(database: Database, votes: Votes) -> None:
    row = votes.vote("c", value=1, user="alice@example.org")
    assert row.user_hash == HASHER.hash("alice@example.org")
    with database.read() as connection:
        stored = connection.execute(sa.select(feedback)).mappings().one()
    assert "alice" not in str(dict(stored))


def test_unknown_completion_is_taken(votes: Votes) -> None:
    result = votes.store.add(parse_feedback({"completion_id": "on-its-way", "value": 1}))
    assert result.created
    assert not result.completion_known


# --- retries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [
        ({"id": "i"}, {"id": "i"}, "same"),
        ({"key": "k"}, {"key": "k"}, "same"),
        ({"id": "i", "key": "k"}, {"id": "i", "key": "k"}, "same"),
        ({"id": "i", "key": "k"}, {"id": "i"}, "same"),  # the header was lost on the way; the body is what counts
        ({"id": "i", "value": "up"}, {"id": "i", "value": True}, "same"),  # said differently, meant the same
        ({"id": "i", "user": "bob"}, {"id": "i", "user": "bob"}, "same"),
        ({}, {}, "new"),  # nothing to recognise it by
        ({"key": "k"}, {"key": "l"}, "new"),
        ({"id": "i"}, {"id": "j"}, "new"),
        ({"id": "i", "value": 1}, {"id": "i", "value": 0}, "conflict"),
        ({"key": "k", "value": 1}, {"key": "k", "value": 0}, "conflict"),
        ({"key": "k"}, {"key": "k", "id": "i"}, "conflict"),  # the second body has an id that the first had not
        ({"id": "i", "user": "bob"}, {"id": "i", "user": "eve"}, "conflict"),
        ({"id": "i", "user": "bob"}, {"id": "i"}, "conflict"),
        ({"id": "i", "metadata": {"a": 1}}, {"id": "i", "metadata": {"a": 2}}, "conflict"),
    ],
)
def test_retries(votes: Votes, first: dict[str, Any], second: dict[str, Any], outcome: str) -> None:
    def add(fields: dict[str, Any]) -> AddResult:
        body = {"completion_id": "c", "value": 1, **fields}
        key = body.pop("key", None)
        return votes.store.add(parse_feedback(body, idempotency_key=key))

    row = add(first).row
    if outcome == "conflict":
        with pytest.raises(ConflictError, match="used before with another body"):
            add(second)
        return
    again = add(second)
    assert again.created == (outcome == "new")
    assert (again.row.id == row.id) == (outcome == "same")
    if outcome == "same":
        assert again.row == row
        assert again.completion_known


def test_id_of_one_vote_with_key_of_another(votes: Votes) -> None:
    votes.store.add(parse_feedback({"completion_id": "c", "value": 1, "id": "i"}))
    votes.store.add(parse_feedback({"completion_id": "c", "value": 1}, idempotency_key="k"))
    with pytest.raises(ConflictError):
        votes.store.add(parse_feedback({"completion_id": "c", "value": 1, "id": "i"}, idempotency_key="k"))


def test_retry_of_a_replaced_vote_does_not_make_it_count(votes: Votes) -> None:
    old = votes.vote("c", value=1, id="old")
    votes.vote("c", value=0, id="new")
    again = votes.store.add(parse_feedback({"completion_id": "c", "value": 1, "id": "old"}))
    assert again.row.id == old.id
    assert not again.row.counts
    assert _counting(votes, "c") == [0.0]


def test_concurrent_duplicates_make_one_row(database: Database, votes: Votes) -> None:
    results: list[AddResult] = []
    barrier = threading.Barrier(8)

    def send() -> None:
        vote = parse_feedback({"completion_id": "c", "value": 1, "id": "i"}, idempotency_key="k")
        barrier.wait()
        results.append(votes.store.add(vote))

    _together(send, 8)
    assert sorted(result.created for result in results) == [False] * 7 + [True]
    assert len({result.row.id for result in results}) == 1
    assert _rows(database) == 1


def test_concurrent_votes_of_one_user_leave_one_that_counts(votes: Votes) -> None:
    barrier = threading.Barrier(8)

    def send() -> None:
        barrier.wait()
        for value in (0, 1, 0):
            votes.vote("c", value=value, user="bob")

    _together(send, 8)
    rows = votes.store.for_completion("c")
    assert len(rows) == 24
    assert len({row.sequence for row in rows}) == 24
    assert [row.counts for row in rows] == [False] * 23 + [True]  # in order of arrival, the last one


def test_votes_racing_with_their_completion_all_get_its_user(database: Database) -> None:
    votes = Votes(database)
    barrier = threading.Barrier(5)

    def send() -> None:
        barrier.wait()
        for n in range(20):
            votes.vote(f"r{n}", value=1)

    def arrive() -> None:
        barrier.wait()
        for n in range(20):
            votes.completions.insert([record(f"r{n}", user_hash="owner")])

    threads = [threading.Thread(target=target) for target in (send, send, send, send, arrive)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n in range(20):
        rows = votes.store.for_completion(f"r{n}")
        assert {row.user_hash for row in rows} == {"owner"}
        assert [row.counts for row in rows] == [False] * 3 + [True]


def _together(target: Any, count: int) -> None:
    threads = [threading.Thread(target=target) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# --- which votes count -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bodies", "counting"),
    [
        ([{"value": 1}, {"value": 0}], [0.0]),  # the last wins
        ([{"value": 1, "user": "bob"}, {"value": 0, "user": "eve"}], [1.0, 0.0]),  # one vote per user
        ([{"value": 1, "user": "bob"}, {"value": 0}], [1.0, 0.0]),  # without a user it is the completion's user: alice
        ([{"value": 1, "user": "alice"}, {"value": 0}], [0.0]),  # the completion's user, named and not
        ([{"value": 1}, {"value": 0, "user": "alice"}], [0.0]),  # the other way round
        ([{"value": 1}, {"value": 0, "choice_index": 1}], [1.0, 0.0]),  # another choice is another answer
        ([{"value": 1}, {"value": 0, "name": "helpful"}], [1.0, 0.0]),  # another question
        ([{"value": 1}, {"comment": "but"}], [1.0, None]),  # a comment replaces no vote
        ([{"comment": "a"}, {"comment": "b"}], [None, None]),  # comments do not compete
        ([{"correction": "a"}, {"value": 1}], [None, 1.0]),  # a vote does not replace a correction
        ([{"value": 1}, {"value": 0}, {"value": 0.5}], [0.5]),
    ],
)
def test_which_votes_count(votes: Votes, bodies: list[dict[str, Any]], counting: list[float | None]) -> None:
    for body in bodies:
        votes.vote("c", **body)
    assert _counting(votes, "c") == counting
    assert len(votes.store.for_completion("c")) == len(bodies)  # history is kept


def test_without_any_user_there_is_one_vote(votes: Votes) -> None:
    votes.vote("anonymous", value=1)
    votes.vote("anonymous", value=0)
    votes.vote("anonymous", value=1, user="bob")
    assert _counting(votes, "anonymous") == [0.0, 1.0]


def test_vote_inherits_the_user_of_the_completion(votes: Votes) -> None:
    assert votes.vote("c", value=1).user_hash == HASHER.hash("alice")
    assert votes.vote("anonymous", value=1).user_hash is None


# --- deletion --------------------------------------------------------------------------------------------------------


def test_deletion_removes_what_was_said_and_keeps_the_id(database: Database, votes: Votes) -> None:
    earlier = votes.vote("c", value=1)
    votes.vote("c", value=0, id="i", comment="secret", correction="secret", metadata={"a": "secret"})
    votes.store.delete("i", actor="tester")
    with pytest.raises(NotFoundError, match="it was deleted"):
        votes.store.get("i")
    with pytest.raises(NotFoundError):
        votes.store.delete("i", actor="tester")
    with pytest.raises(NotFoundError):
        votes.store.delete("never", actor="tester")
    with pytest.raises(ConflictError, match="deleted"):  # a late retry must not bring it back
        votes.vote("c", value=0, id="i", comment="secret", correction="secret", metadata={"a": "secret"})
    with database.read() as connection:
        assert "secret" not in str(connection.execute(sa.select(feedback)).mappings().all())
    assert votes.store.for_completion("c") == [votes.store.get(earlier.id)]
    assert _counting(votes, "c") == []  # taking a thumb back does not restore an older one
    (event,) = list_events(database)
    assert (event.kind, event.actor, event.data) == ("feedback.deleted", "tester", {"feedback_id": "i"})


def test_vote_after_deletion_counts(votes: Votes) -> None:
    votes.store.delete(votes.vote("c", value=0).id, actor="tester")
    votes.vote("c", value=1)
    assert _counting(votes, "c") == [1.0]


# --- figures and export ----------------------------------------------------------------------------------------------


def test_stats(votes: Votes) -> None:
    votes.vote("c", value=1)
    votes.vote("c", value=0, user="bob", comment="x")
    votes.vote("c", value=1, user="bob")  # replaces bob's
    votes.vote("c", value=0.5, user="eve")
    votes.vote("c", value=0, name="helpful", user="joe")  # not a rating
    votes.vote("d", correction="y")
    votes.store.delete(votes.vote("d", value=0).id, actor="tester")
    votes.vote("nowhere", value=1)
    stats = votes.store.stats()
    assert [version.to_json() for version in stats.versions] == [
        {"adapter": "b", "number": 1, "completions": 1, "up": 0, "down": 0, "neutral": 0, "users": 0, "comments": 0,
         "corrections": 0, "share": None},
        {"adapter": "chat", "number": 1, "completions": 2, "up": 2, "down": 0, "neutral": 1, "users": 3, "comments": 1,
         "corrections": 0, "share": 1.0},
        {"adapter": "chat", "number": 2, "completions": 1, "up": 0, "down": 0, "neutral": 0, "users": 0, "comments": 0,
         "corrections": 1, "share": None},
    ]  # fmt: skip
    assert stats.unmatched == 1
    assert [version.number for version in votes.store.stats("chat").versions] == [1, 2]
    assert votes.store.stats("nobody").versions == ()


def test_export_is_complete_and_in_order(votes: Votes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scion_feedback.feedback._EXPORT_PAGE", 3)
    rows = [votes.vote("c", value=n % 2, user=f"user-{n}") for n in range(6)] + [votes.vote("nowhere", value=1)]
    votes.store.delete(rows[1].id, actor="tester")
    exported = [row.to_json() for row in votes.store.export()]
    assert [row["id"] for row in exported] == [row.id for row in rows if row != rows[1]]
    assert exported[0]["model"] == "chat:1"
    assert exported[0]["user_hash"] == HASHER.hash("user-0")
    assert exported[-1]["model"] is None
    assert "user-0" not in str(exported)
    assert len(list(votes.store.export("chat"))) == 5
    assert list(votes.store.export("b")) == []


def test_clock_is_the_injected_one(database: Database) -> None:
    store = FeedbackStore(database, HASHER, lambda: 123.75)
    row: FeedbackRow = store.add(parse_feedback({"completion_id": "c", "value": 1})).row
    assert row.created_at == 123.75
