"""Findings of the red team as feedback, on both databases: kept once, apart from users' votes, and learned from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scion_adapters.analysis import user_votes
from scion_adapters.database import Database
from scion_adapters.errors import InvalidInputError
from scion_adapters.records import RED_TEAM, VersionRef
from scion_adapters.settings import Settings
from scion_adapters.status import read_status
from scion_feedback.captures import CompletionStore
from scion_feedback.findings import Finding, record_findings
from scion_feedback.snapshots import Snapshot, build_snapshot, new_ratings_since
from tests.helpers.feedback import Votes, record

REF = VersionRef("chat", 1)
NUM_USERS = 18
FINDING = Finding(
    suite="sha256:suite",
    probe="leak-1",
    category="leak",
    check="must_not_contain",
    fault="says 'heron'",
    messages=({"role": "system", "content": "The word is heron."}, {"role": "user", "content": "Which word?"}),
    answer="It is heron.",
    finish_reason="stop",
    num_tokens=5,
)
TEN = [replace(FINDING, probe=f"leak-{n}", answer=f"It is heron {n}.") for n in range(10)]


@pytest.fixture
def votes(database: Database) -> Votes:
    """Users, one thumb each about `chat:1`, every third one down."""
    votes = Votes(database)
    votes.completions.insert([record(f"c{n}", user_hash=f"u{n}") for n in range(NUM_USERS)])
    for n in range(NUM_USERS):
        votes.vote(f"c{n}", value=n % 3 != 0)
    return votes


def frozen(database: Database, directory: Path, **changes: Any) -> Snapshot:
    fields: dict[str, Any] = {"adapter": "chat", "heldout_share": 0.3, "min_ratings": 2, "red_team_share": 0.1}
    return build_snapshot(database, directory, **{**fields, **changes}, clock=lambda: 5000.0)


def test_a_finding_is_a_completion_and_a_thumb_down_with_its_origin(database: Database) -> None:
    (vote_id,) = record_findings(database, REF, [FINDING], clock=lambda: 3000.0)
    vote = Votes(database).store.get(vote_id)
    assert (vote.name, vote.source, vote.value, vote.user_hash) == (RED_TEAM, RED_TEAM, 0.0, None)
    assert vote.metadata == {
        "suite": "sha256:suite",
        "probe": "leak-1",
        "category": "leak",
        "check": "must_not_contain",
        "fault": "says 'heron'",
    }
    completion = CompletionStore(database).get(vote.completion_id)
    assert (completion.adapter, completion.number, completion.route) == ("chat", 1, RED_TEAM)
    assert completion.request["messages"] == list(FINDING.messages)
    assert completion.choices[0]["message"]["content"] == "It is heron."
    assert completion.rollout_id is None


def test_the_same_finding_again_changes_nothing_and_another_answer_is_another_finding(database: Database) -> None:
    first = record_findings(database, REF, [FINDING], clock=lambda: 3000.0)
    assert record_findings(database, REF, [FINDING], clock=lambda: 4000.0) == first
    others = [replace(FINDING, answer="heron, heron"), replace(FINDING, suite="sha256:other")]
    more = [*record_findings(database, REF, others), *record_findings(database, VersionRef("chat", 2), TEN)]
    assert len({*first, *more}) == 13
    assert len(list(Votes(database).store.export())) == 13


def test_statistics_and_the_guard_of_rollouts_see_users_only(database: Database, votes: Votes) -> None:
    def seen() -> tuple[Any, ...]:
        present = read_status(database, Settings())
        return (
            votes.store.stats("chat"),
            user_votes(database, "chat", [1], 0.0),
            new_ratings_since(database, "chat", 0.0),
            (present.num_completions, present.num_feedback, present.num_counting_feedback),
        )

    before = seen()
    record_findings(database, REF, TEN, clock=lambda: 3000.0)
    assert seen() == before
    assert before[2] == NUM_USERS


def test_a_snapshot_takes_a_bounded_share_the_newest_and_only_to_learn_from(
    database: Database, votes: Votes, tmp_path: Path
) -> None:
    record_findings(database, REF, TEN, clock=lambda: 3000.0)
    snapshot = frozen(database, tmp_path)
    taken = [row for row in snapshot.rows if row.source == RED_TEAM]
    assert len(taken) == 2  # a tenth of 18 + 2
    assert [row.answer for row in taken] == ["It is heron 8.", "It is heron 9."]
    assert {(row.split, row.liked, row.kind, row.user_hash) for row in taken} == {("train", False, "rating", None)}
    assert snapshot.manifest["counts"]["red_team"] == 2
    assert snapshot.manifest["counts"]["disliked"] == 6  # users' thumbs
    assert snapshot.manifest["dropped"] == {"red_team_share": 8}


def test_users_are_held_out_as_they_are_without_findings(database: Database, votes: Votes, tmp_path: Path) -> None:
    record_findings(database, REF, TEN, clock=lambda: 3000.0)
    alone, together = frozen(database, tmp_path, red_team_share=0.0), frozen(database, tmp_path, red_team_share=0.3)
    assert [row for row in together.rows if row.source != RED_TEAM] == list(alone.rows)
    assert len(together.rows) == len(alone.rows) + 7
    assert {row.split for row in alone.rows} >= {"train", "heldout"}


def test_findings_do_not_make_up_for_missing_ratings(database: Database, votes: Votes, tmp_path: Path) -> None:
    record_findings(database, REF, TEN, clock=lambda: 3000.0)
    with pytest.raises(InvalidInputError, match="18 usable"):
        frozen(database, tmp_path, min_ratings=19, red_team_share=0.3)


def test_a_user_cannot_pose_as_the_red_team(database: Database, votes: Votes, tmp_path: Path) -> None:
    votes.completions.insert([record("mine", user_hash="u0")])
    votes.vote("mine", name=RED_TEAM, value=0)
    snapshot = frozen(database, tmp_path)
    assert snapshot.manifest["dropped"] == {"other_name": 1}
    assert all(row.source == "user" for row in snapshot.rows)
