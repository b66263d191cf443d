"""Replay: ratings that earlier runs learned from, mixed into a snapshot whose window has left them behind.

A run on recent ratings alone forgets what older ones taught (Rolnick et al., "Experience Replay for Continual
Learning", 2019, arXiv 1811.11682). Owns which rows may come back, and the draw; what is written is in snapshots.py.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import sqlalchemy as sa

from scion_adapters import tables
from scion_feedback.selection import Past, SnapshotRow


@dataclass(frozen=True, slots=True)
class History:
    """What earlier snapshots of an adapter used: `trained` maps a vote to the newest snapshot that trained on it."""

    trained: Mapping[str, str]  # feedback id -> snapshot id
    judged: Collection[str]  # completions with a vote that any snapshot held out, or kept apart as newest
    past: Past = field(default_factory=Past)


def read_history(connection: sa.Connection, adapter: str) -> History:
    """The history of `adapter`, from the book of snapshots."""
    rows, snapshots = tables.snapshot_rows, tables.snapshots
    query = (
        sa.select(rows.c.feedback_id, rows.c.completion_id, rows.c.split, rows.c.snapshot_id)
        .select_from(rows.join(snapshots, snapshots.c.id == rows.c.snapshot_id))
        .where(snapshots.c.adapter == adapter)
        .order_by(snapshots.c.created_at, snapshots.c.id)
    )
    trained: dict[str, str] = {}
    judged: set[str] = set()
    learned: set[str] = set()
    held_out: set[str] = set()
    for row in connection.execute(query):
        if row.split == "train":
            trained[row.feedback_id] = row.snapshot_id
            learned.add(row.completion_id)
        else:
            judged.add(row.completion_id)
        if row.split == "heldout":
            held_out.add(row.completion_id)
    return History(trained, judged, Past(learned, held_out))


def draw(
    usable: Sequence[SnapshotRow], current: Sequence[SnapshotRow], history: History, *, share: float, seed: int
) -> list[SnapshotRow]:
    """Rows to add to the `current` ones, so that `share` of all training rows are replayed, if there are as many.

    `usable` are the adapter's usable rows of any age: a vote that was deleted or replaced since is not among them, and
    so cannot come back. Out of them come those that a snapshot trained on, whose answer no snapshot, the current one
    included, ever held out, and whose user is not held out now. The draw depends on the seed and the rows alone.
    """
    num_current = sum(row.split == "train" for row in current)
    num_wanted = round(num_current * share / (1.0 - share))
    present = {row.feedback_id for row in current}
    judged = {*history.judged, *(row.completion_id for row in current if row.split != "train")}
    heldout_users = {row.user_hash for row in current if row.split == "heldout" and row.user_hash is not None}
    pool = sorted(
        (
            row
            for row in usable
            if row.feedback_id in history.trained
            and row.feedback_id not in present
            and row.completion_id not in judged
            and row.user_hash not in heldout_users
        ),
        key=lambda row: row.feedback_id,
    )
    drawn = random.Random(seed).sample(pool, min(num_wanted, len(pool)))
    return [replace(row, split="train", replayed=True) for row in sorted(drawn, key=lambda row: row.created_at)]
