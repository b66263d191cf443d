"""Which rows of earlier snapshots may come back, and how many."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scion_feedback.replay import History, draw
from scion_feedback.selection import SnapshotRow, Split
from tests.helpers.training import snapshot_row


def row(index: int, split: Split = "train", user: str | None = None) -> SnapshotRow:
    return replace(
        snapshot_row(feedback_id=f"fb{index}", completion_id=f"c{index}", created_at=float(index)),
        split=split,
        user_hash=user or f"u{index}",
    )


OLD = [row(index) for index in range(100)]
NEW = [row(index) for index in range(100, 130)]
HISTORY = History({old.feedback_id: "sha256:a" for old in OLD}, frozenset())


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.25, 10),  # 10 of 40
        (0.5, 30),  # as many as there are new ones
        (0.9, 100),  # all there are
        (0.0, 0),
    ],
)
def test_the_share_is_of_all_training_rows(share: float, expected: int) -> None:
    drawn = draw([*OLD, *NEW], NEW, HISTORY, share=share, seed=0)
    assert len(drawn) == expected
    assert {entry.feedback_id for entry in drawn} <= {old.feedback_id for old in OLD}
    assert all(entry.replayed and entry.split == "train" for entry in drawn)
    assert drawn == sorted(drawn, key=lambda entry: entry.created_at)


def test_the_draw_depends_on_the_seed_and_not_on_the_order() -> None:
    first = draw(OLD, NEW, HISTORY, share=0.25, seed=1)
    assert draw(OLD[::-1], NEW, HISTORY, share=0.25, seed=1) == first
    assert draw(OLD, NEW, HISTORY, share=0.25, seed=2) != first


@pytest.mark.parametrize(
    ("current", "history", "excluded"),
    [
        (NEW, replace(HISTORY, trained={f"fb{i}": "sha256:a" for i in range(1, 100)}), "fb0"),  # never trained on
        (NEW, replace(HISTORY, judged={"c0"}), "fb0"),  # an earlier snapshot judged by it
        ([*NEW, replace(row(200, "heldout"), completion_id="c0")], HISTORY, "fb0"),  # this one does
        ([*NEW, replace(row(200, "newest"), completion_id="c0")], HISTORY, "fb0"),  # among its newest
        ([*NEW, row(200, "heldout", user="u0")], HISTORY, "fb0"),  # its user is held out by now
        ([*NEW, OLD[0]], HISTORY, "fb0"),  # it is in the window anyway
    ],
)
def test_what_was_held_out_or_not_learned_does_not_come_back(
    current: list[SnapshotRow], history: History, excluded: str
) -> None:
    drawn = draw(OLD, current, history, share=0.9, seed=0)
    assert {entry.feedback_id for entry in drawn} == {old.feedback_id for old in OLD} - {excluded}
