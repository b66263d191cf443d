"""Frozen training sets: a directory named by the digest of its rows, and the tables that say which votes are in it.

`rows.jsonl` holds the examples, `manifest.json` the counts, the split and what was dropped and why. The same votes make
the same snapshot. What may become a row is decided in selection.py.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from scion_adapters import clock as clocks
from scion_adapters import tables
from scion_adapters.clock import Clock
from scion_adapters.database import Database, insert_ignore
from scion_adapters.errors import InvalidInputError, NotFoundError, RejectedError
from scion_adapters.files import publish_directory, remove_tree, write_file
from scion_adapters.records import RED_TEAM
from scion_feedback.parsing import DEFAULT_NAME
from scion_feedback.replay import draw, read_history
from scion_feedback.selection import DropReason, SnapshotRow, Split, Vote, assign_splits, limit_red_team, select

FORMAT = 1
ROWS_FILE = "rows.jsonl"
MANIFEST_FILE = "manifest.json"
_DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A frozen training set. `id` is the digest of its rows, `path` its directory."""

    id: str
    adapter: str
    path: Path
    manifest: Mapping[str, Any]
    rows: tuple[SnapshotRow, ...]

    def split(self, split: Split) -> tuple[SnapshotRow, ...]:
        return tuple(row for row in self.rows if row.split == split)


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """What the database knows of a snapshot, without its rows."""

    id: str
    adapter: str
    path: Path
    manifest: Mapping[str, Any]
    created_at: float


def build_snapshot(
    database: Database,
    directory: Path,
    *,
    adapter: str,
    heldout_share: float,
    min_ratings: int,
    newest_share: float = 0.0,
    red_team_share: float = 0.0,
    replay_share: float = 0.0,
    seed: int = 0,
    max_age_days: float | None = None,
    since: float | None = None,
    clock: Clock = clocks.now,
) -> Snapshot:
    """Freeze the usable votes about `adapter` in a new directory under `directory`, and record which they are.

    `heldout_share` of the users and the newest `newest_share` of the votes are kept from training; what earlier
    snapshots of the adapter held out stays out of it (see `selection.assign_splits`). `since` is a Unix time; older
    votes are left out, as are those older than `max_age_days`. Findings of the red team come on top: at most
    `red_team_share` of all rows, and for training only. Of the training rows up to `replay_share` are older ones that
    an earlier snapshot trained on, drawn by `seed`.
    Raises InvalidInputError when fewer than `min_ratings` votes of users are usable.
    """
    now = clock()
    age_limit = 0.0 if max_age_days is None else now - max_age_days * _DAY_S
    not_before = max(since or 0.0, age_limit)
    with database.read() as connection:
        rows, dropped = select(_votes(connection, adapter), not_before=not_before)
        if num_others := _count_other_adapters(connection, adapter):
            dropped[DropReason.OTHER_ADAPTER.value] = num_others
        history = read_history(connection, adapter)
    rows, findings, num_over = limit_red_team(rows, red_team_share)
    if num_over:
        dropped[DropReason.RED_TEAM_SHARE.value] = num_over
    if len(rows) < min_ratings:
        raise InvalidInputError(_too_few(adapter, len(rows), min_ratings, dropped), field="trainer.min_ratings")
    rows, rule, undecided = assign_splits(rows[::-1], heldout_share, newest_share, history.past)
    dropped += undecided
    if replay_share and not_before:
        with database.read() as connection:
            usable, _, _ = limit_red_team(select(_votes(connection, adapter), not_before=0.0)[0], 0.0)
        older = [row for row in usable if row.created_at < not_before]  # others are in `rows`, or left out on purpose
        replayed = draw(older, rows, history, share=replay_share, seed=seed)
        rows += replayed
        origins = Counter(history.trained[row.feedback_id] for row in replayed)
    else:
        origins = Counter()
    rows += findings[::-1]  # only ever learned from: what is held out is users' judgement
    lines = [json.dumps(row.to_json(), sort_keys=True).encode() + b"\n" for row in rows]
    snapshot_id = _digest(adapter, lines)
    manifest = {
        "format": FORMAT,
        "id": snapshot_id,
        "adapter": adapter,
        "created_at": now,
        "counts": _counts(rows),
        "versions": {str(number): n for number, n in sorted(Counter(row.number for row in rows).items())},
        "split": {"by": rule, "heldout_share": heldout_share, "newest_share": newest_share},
        "replay": {"share": replay_share, "seed": seed, "rows": origins.total(), "from": dict(sorted(origins.items()))},
        "filter": {"not_before": not_before or None, "min_ratings": min_ratings},
        "dropped": dict(sorted(dropped.items())),
    }
    path = _publish(directory, snapshot_id, lines, manifest)
    snapshot = load_snapshot(path)  # what a run will read; an equal snapshot made earlier keeps its own manifest
    _record(database, snapshot, now)
    return snapshot


def load_snapshot(path: Path) -> Snapshot:
    """Read a snapshot's directory. Raises NotFoundError, and RejectedError when its rows do not match its name."""
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_bytes())
        lines = (path / ROWS_FILE).read_bytes().splitlines(keepends=True)
    except FileNotFoundError as error:
        raise NotFoundError(f"{path} is not a snapshot: {error.filename} does not exist; build it again") from error
    except ValueError as error:
        raise RejectedError(f"the snapshot {path} is damaged: {error}; build it again", reason="unreadable") from error
    if manifest.get("format") != FORMAT:
        raise RejectedError(
            f"the snapshot {path} has format {manifest.get('format')!r}, this program reads {FORMAT}; build it again",
            reason="unsupported_format",
        )
    if _digest(manifest["adapter"], lines) != manifest["id"]:
        raise RejectedError(
            f"the rows of the snapshot {path} do not match its digest {manifest['id']}; build it again",
            reason="digest_mismatch",
        )
    rows = tuple(SnapshotRow(**json.loads(line)) for line in lines)
    return Snapshot(manifest["id"], manifest["adapter"], path, manifest, rows)


def find_snapshot(database: Database, text: str) -> SnapshotInfo:
    """The recorded snapshot whose id begins with `text`. Raises NotFoundError, or InvalidInputError if several do."""
    prefix = text if text.startswith("sha256:") else f"sha256:{text}"
    table = tables.snapshots
    with database.read() as connection:
        query = sa.select(table).where(table.c.id.startswith(prefix, autoescape=True)).limit(2)
        found = connection.execute(query).mappings().all()
    if not found:
        raise NotFoundError(f"no snapshot {text!r}: build one with `scion dataset build NAME`")
    if len(found) > 1:
        raise InvalidInputError(f"several snapshots begin with {text!r}: give more digits", field="snapshot")
    return SnapshotInfo(**{**found[0], "path": Path(found[0]["path"])})


def new_ratings_since(database: Database, adapter: str, timestamp: float) -> int:
    """How many votes that a run could learn from came after the Unix time `timestamp`."""
    feedback, completions = tables.feedback, tables.completions
    rating = sa.and_(feedback.c.value.is_not(None), feedback.c.counts, feedback.c.name == DEFAULT_NAME)
    query = (
        sa.select(sa.func.count())
        .select_from(feedback.join(completions, completions.c.id == feedback.c.completion_id))
        .where(
            completions.c.adapter == adapter,
            feedback.c.created_at > timestamp,
            feedback.c.deleted_at.is_(None),
            sa.or_(rating, feedback.c.correction.is_not(None)),
        )
    )
    with database.read() as connection:
        return int(connection.execute(query).scalar_one())


def _votes(connection: sa.Connection, adapter: str) -> Iterator[Vote]:
    """Votes about `adapter` and votes about nothing known, newest first."""
    feedback, completions = tables.feedback, tables.completions
    query = (
        sa.select(
            *(feedback.c[name] for name in ("id", "completion_id", "choice_index", "name", "value", "correction")),
            *(feedback.c[name] for name in ("user_hash", "counts", "created_at", "deleted_at", "source")),
            *(completions.c[name] for name in ("number", "route", "request", "choices", "conversation")),
            completions.c.user_hash.label("completion_user"),
        )
        .select_from(feedback.outerjoin(completions, completions.c.id == feedback.c.completion_id))
        .where(sa.or_(completions.c.adapter == adapter, completions.c.id.is_(None)))
        .order_by(feedback.c.sequence.desc())
    )
    for row in connection.execution_options(yield_per=500).execute(query).mappings():
        yield Vote(**row)


def _count_other_adapters(connection: sa.Connection, adapter: str) -> int:
    feedback, completions = tables.feedback, tables.completions
    query = (
        sa.select(sa.func.count())
        .select_from(feedback.join(completions, completions.c.id == feedback.c.completion_id))
        .where(completions.c.adapter != adapter)
    )
    return int(connection.execute(query).scalar_one())


def _too_few(adapter: str, num_usable: int, min_ratings: int, dropped: Mapping[str, int]) -> str:
    why = ", ".join(f"{n} {reason}" for reason, n in sorted(dropped.items())) or "none"
    return (
        f"{num_usable} usable ratings of {adapter!r}, {min_ratings} are needed (left out: {why}); "
        "collect more, or lower trainer.min_ratings"
    )


def _counts(rows: list[SnapshotRow]) -> dict[str, int]:
    return {
        "rows": len(rows),
        "train": sum(row.split == "train" for row in rows),
        "heldout": sum(row.split == "heldout" for row in rows),
        "newest": sum(row.split == "newest" for row in rows),
        "liked": sum(row.liked is True for row in rows),
        "disliked": sum(row.liked is False for row in rows if row.source != RED_TEAM),
        "red_team": sum(row.source == RED_TEAM for row in rows),
        "corrections": sum(row.correction is not None for row in rows),
        "users": len({row.user_hash for row in rows if row.user_hash is not None}),
    }


def _digest(adapter: str, lines: list[bytes]) -> str:
    digest = hashlib.sha256(json.dumps({"format": FORMAT, "adapter": adapter}).encode())
    for line in lines:
        digest.update(line)
    return f"sha256:{digest.hexdigest()}"


def _publish(directory: Path, snapshot_id: str, lines: list[bytes], manifest: Mapping[str, Any]) -> Path:
    target = directory / snapshot_id.removeprefix("sha256:")
    temporary = directory / f".tmp-{secrets.token_hex(8)}"
    temporary.mkdir(parents=True)
    try:
        write_file(temporary / ROWS_FILE, b"".join(lines))
        write_file(temporary / MANIFEST_FILE, json.dumps(manifest, indent=2).encode())
        publish_directory(temporary, target)
    finally:
        remove_tree(temporary)
    return target


def _record(database: Database, snapshot: Snapshot, now: float) -> None:
    with database.write() as connection:
        entry = {
            "id": snapshot.id,
            "adapter": snapshot.adapter,
            "path": str(snapshot.path),
            "manifest": dict(snapshot.manifest),
            "created_at": now,
        }
        if not insert_ignore(connection, tables.snapshots, [entry]):
            return
        members = [
            {
                "snapshot_id": snapshot.id,
                "feedback_id": row.feedback_id,
                "completion_id": row.completion_id,
                "user_hash": row.user_hash,
                "split": row.split,
            }
            for row in snapshot.rows
        ]
        if members:
            connection.execute(sa.insert(tables.snapshot_rows), members)
