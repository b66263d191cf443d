"""The table of completions, on both databases."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from scion_adapters import tables
from scion_adapters.database import Database
from scion_adapters.errors import InvalidInputError, NotFoundError, UnavailableError
from scion_feedback.captures import CompletionStore, InsertResult
from tests.helpers.feedback import Votes, choice, record


def _count(database: Database) -> int:
    with database.read() as connection:
        return int(connection.execute(sa.select(sa.func.count()).select_from(tables.completions)).scalar_one())


def test_round_trip(database: Database) -> None:
    store = CompletionStore(database)
    full = record(
        "c",
        number=7,
        probability=0.1,
        rollout_id="rollout-1",
        user_hash="u" * 32,
        conversation="conversation 1",
        request={"messages": [{"role": "user", "content": "naïve 🙂 \u2028"}], "temperature": 0.5, "stop": None},
        choices=[choice("a", index=0), choice("b", index=1)],
        prompt_tokens=5,
        completion_tokens=6,
        finish_reason="stop",
        first_token_ms=1.25,
        stream=True,
    )
    assert store.insert([full]) == InsertResult(1, 0, 0)
    assert store.get("c") == full
    with pytest.raises(NotFoundError, match="'other'"):
        store.get("other")


def test_redelivery_and_reuse_are_told_apart(database: Database) -> None:
    store = CompletionStore(database)
    records = [record(f"c{n}") for n in range(100)]
    assert store.insert(records) == InsertResult(100, 0, 0)
    assert store.insert(records) == InsertResult(0, 100, 0)
    mixed = [records[0], record("c1", record_id="another"), record("new"), record("new"), record("new", record_id="x")]
    assert store.insert(mixed) == InsertResult(new=1, redelivered=2, conflicting=2)
    assert store.get("c1") == records[1]
    assert _count(database) == 101
    assert store.insert([]) == InsertResult(0, 0, 0)


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"conversation": "x" * 300}, 255),  # clients choose conversations freely
        ({"conversation": "a\0b\ud800"}, 4),  # what a database cannot hold is replaced
        ({"requested_model": "m" * 1000}, 255),
    ],
)
def test_free_text_is_made_storable(database: Database, fields: dict[str, Any], kept: int) -> None:
    store = CompletionStore(database)
    assert store.insert([record("c", **fields)]).new == 1
    (name,) = fields
    assert len(getattr(store.get("c"), name)) == kept


def test_long_conversations_stay_apart(database: Database) -> None:
    store = CompletionStore(database)
    store.insert([record("c1", conversation="x" * 300 + "1"), record("c2", conversation="x" * 300 + "2")])
    assert store.get("c1").conversation != store.get("c2").conversation


@pytest.mark.parametrize(
    "fields",
    [
        {"id": "i" * 256},  # an X-Request-Id as long as its sender liked
        {"id": "a\0"},
        {"id": ""},
        {"request": {"x": object()}},  # not JSON
    ],
)
def test_what_can_never_be_stored_is_said_at_once(database: Database, fields: dict[str, Any]) -> None:
    bad = record(fields.get("id", "bad"), **{k: v for k, v in fields.items() if k != "id"})
    with pytest.raises(InvalidInputError):
        CompletionStore(database).insert([record("good"), bad])
    assert _count(database) == 0


def test_surrogates_and_nul_inside_messages_are_kept(database: Database) -> None:
    store = CompletionStore(database)
    odd = record("c", request={"messages": [{"role": "user", "content": "half \ud83d and \0"}]})
    store.insert([odd])
    assert store.get("c") == odd


def test_missing_table_means_try_again(database: Database) -> None:
    # Nothing may be written off as unstorable because a migration has not run yet.
    with database.write() as connection:
        connection.execute(sa.text("DROP TABLE completions"))
    with pytest.raises((UnavailableError, sa.exc.ProgrammingError)):
        CompletionStore(database).insert([record("c")])


def test_early_vote_gets_the_user_of_its_completion(database: Database) -> None:
    votes = Votes(database)
    anonymous = votes.vote("c", value=1)
    named = votes.vote("c", value=0, user="bob")
    assert anonymous.user_hash is None
    votes.completions.insert([record("c", user_hash="alice-hash")])
    assert votes.store.get(anonymous.id).user_hash == "alice-hash"
    assert votes.store.get(anonymous.id).counts
    assert votes.store.get(named.id) == named


def test_early_votes_that_turn_out_to_be_one_users_count_once(database: Database) -> None:
    votes = Votes(database)
    owner = votes.vote("other", value=1, user="alice").user_hash
    earlier = votes.vote("c", value=1, user="alice")
    later = votes.vote("c", value=0)
    comment = votes.vote("c", comment="no vote")
    assert votes.store.get(earlier.id).counts
    votes.completions.insert([record("c", user_hash=owner)])
    assert not votes.store.get(earlier.id).counts
    assert votes.store.get(later.id).counts
    assert votes.store.get(comment.id).user_hash == owner


def test_a_refused_record_gives_its_user_to_no_vote(database: Database) -> None:
    votes = Votes(database)
    votes.completions.insert([record("c")])
    vote = votes.vote("c", value=1)
    assert votes.completions.insert([record("c", record_id="other", user_hash="mallory")]) == InsertResult(0, 0, 1)
    assert votes.store.get(vote.id).user_hash is None


def test_of_two_records_with_one_id_the_stored_one_gives_its_user(database: Database) -> None:
    votes = Votes(database)
    vote = votes.vote("c", value=1)
    both = [record("c", user_hash="alice"), record("c", record_id="other", user_hash="mallory")]
    assert votes.completions.insert(both) == InsertResult(1, 0, 1)
    assert votes.completions.get("c").user_hash == "alice"
    assert votes.store.get(vote.id).user_hash == "alice"


def test_a_delivery_that_comes_again_gives_its_user_still(database: Database) -> None:
    # As if killed between the completion and the votes: PostgreSQL stores them in two transactions.
    votes = Votes(database)
    served = record("c", user_hash="alice")
    votes.completions.insert([served])
    vote = votes.vote("c", value=1)
    with database.write() as connection:
        connection.execute(sa.update(tables.feedback).values(user_hash=None))
    assert votes.completions.insert([served]) == InsertResult(0, 1, 0)
    assert votes.store.get(vote.id).user_hash == "alice"
