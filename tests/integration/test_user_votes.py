"""Votes per user, on both databases: whose count, and how often."""

from __future__ import annotations

from typing import Any

import pytest

from scion_adapters.analysis import UserVotes, user_votes
from scion_adapters.database import Database
from tests.helpers.rollouts import START, add_completion, add_version

ROLLOUT = "rollout-1"


@pytest.fixture(autouse=True)
def _versions(database: Database) -> None:
    add_version(database, 7)
    add_version(database, 8)


def votes(database: Database, *numbers: int) -> dict[int, UserVotes]:
    return user_votes(database, "chat", numbers or (7, 8), START, rollout_id=ROLLOUT)


def test_a_user_counts_once_with_the_mean_of_their_votes(database: Database) -> None:
    for value in (1.0, 1.0, 1.0, 0.0):
        add_completion(database, 8, rollout_id=ROLLOUT, at=START, user="ann", vote=value)
    add_completion(database, 8, rollout_id=ROLLOUT, at=START, user="ben", vote=0.25)
    found = votes(database)
    assert found[8] == UserVotes(users=2, votes=5, mean=0.5, mean_square=(0.75**2 + 0.25**2) / 2)
    assert found[7] == UserVotes()


def test_a_vote_without_a_user_counts_for_its_conversation_or_not_at_all(database: Database) -> None:
    for _ in range(2):
        add_completion(database, 8, rollout_id=ROLLOUT, at=START, conversation="talk", vote=1.0)
    add_completion(database, 8, rollout_id=ROLLOUT, at=START, vote=0.0)
    assert votes(database)[8] == UserVotes(users=1, votes=2, mean=1.0, mean_square=1.0)


def test_only_counting_ratings_of_the_rollouts_own_draws(database: Database) -> None:
    add_completion(database, 8, rollout_id=ROLLOUT, at=START, user="ann", vote=1.0)
    others: list[dict[str, Any]] = [
        {"rollout_id": None},  # asked by its exact name
        {"rollout_id": "rollout-0"},  # an earlier rollout
        {"at": START - 1},
        {"adapter": "code"},
        {"counts": False},  # a later vote replaced it
        {"deleted": True},
        {"name": "speed"},  # another feedback name
        {"vote": None},
    ]
    for other in others:
        add_completion(database, 8, **({"rollout_id": ROLLOUT, "at": START, "user": str(other), "vote": 0.0} | other))
    assert votes(database)[8] == UserVotes(users=1, votes=1, mean=1.0, mean_square=1.0)


def test_without_a_rollout_all_traffic_counts(database: Database) -> None:
    add_completion(database, 8, rollout_id=None, at=START, user="ann", vote=1.0)
    add_completion(database, 8, rollout_id=ROLLOUT, at=START, user="ben", vote=0.0)
    assert user_votes(database, "chat", [8], START)[8].users == 2


def test_the_base_has_votes_too(database: Database) -> None:
    add_completion(database, 0, rollout_id=ROLLOUT, at=START, user="ann", vote=1.0)
    assert votes(database, 0, 8) == {0: UserVotes(1, 1, 1.0, 1.0), 8: UserVotes()}
