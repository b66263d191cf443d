"""What must hold of registry, store and database at any moment, whoever was killed where; and pictures to compare.

`check_legal` asserts; `picture` is all that the database says, without times and random names; `residue` is what lies
in the store and belongs to nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from scion_adapters import tables
from scion_adapters.adapter_files import MANIFEST_FILE
from scion_adapters.artifacts import ArtifactStore
from scion_adapters.database import Database
from scion_adapters.records import CHALLENGER, RolloutState, VersionState
from scion_adapters.routing import routing_in

Rows = list[dict[str, Any]]
Picture = dict[str, Rows]
_PASSING = {  # what differs from one attempt to the next
    "at", "created_at", "updated_at", "started_at", "step_started_at", "heartbeat_at", "expires_at", "finished_at",
    "evaluation_key", "rollout_id",
}  # fmt: skip
_WITH_RANDOM_IDS = ("rollouts", "events", "alias_history", "runs")
_PICTURED = ("adapters", "versions", "counters", "aliases", "alias_history", "rollouts", "events", "runs")


def picture(database: Database) -> Picture:
    """The database's contents, comparable between two attempts at the same thing."""
    with database.read() as connection:
        return {name: [_plain(name, row) for row in _rows(connection, name)] for name in _PICTURED}


def check_legal(database: Database, store: ArtifactStore) -> None:
    """AssertionError unless the registry is consistent in itself and with the files."""
    with database.read() as connection:
        found = {name: _rows(connection, name) for name in _PICTURED}
        routing = routing_in(connection)
    states = {(row["adapter"], row["number"]): VersionState(row["state"]) for row in found["versions"]}
    _check_files(found["versions"], store)
    _check_numbers(found)
    _check_aliases(found, states)
    _check_events(found)
    for line in routing.adapters.values():
        for number in {line.champion, line.challenger} - {0, None}:
            assert states[line.adapter, number] is VersionState.ACCEPTED, f"{line.adapter}:{number} is routed to"
    active = {(row["adapter"], row["number"]) for row in found["rollouts"] if RolloutState(row["state"]).is_active}
    assert active == {(adapter, number) for adapter, alias, number in _alias_rows(found) if alias == CHALLENGER}


def residue(database: Database, store: ArtifactStore) -> list[Path]:
    """Paths in the store that belong to no version: what a killed process left."""
    columns = tables.versions.c
    with database.read() as connection:
        query = sa.select(columns.digest).where(columns.files_removed_at.is_(None))
        digests = set(connection.execute(query).scalars())
    owned = {digest.removeprefix("sha256:") for digest in digests}
    places = [path for name in ("tmp", "versions") if (store.root / name).is_dir() for path in _list(store.root / name)]
    return [path for path in places if path.name not in owned]


def is_complete(directory: Path) -> bool:
    """A published directory: its manifest came last."""
    return (directory / MANIFEST_FILE).is_file()


def _check_files(versions: Rows, store: ArtifactStore) -> None:
    for row in versions:
        if row["files_removed_at"] is None and row["state"] != VersionState.QUARANTINED:
            store.verify(row["digest"])
        else:
            assert row["state"] not in (VersionState.ACCEPTED, VersionState.CANDIDATE), row
    for path in _list(store.root / "versions") if (store.root / "versions").is_dir() else []:
        assert is_complete(path), f"{path} is half a version"


def _check_numbers(found: Mapping[str, Rows]) -> None:
    counters = {row["name"]: row["value"] for row in found["counters"]}
    for adapter, rows in _by_adapter(found["versions"]).items():
        numbers = [row["number"] for row in rows]
        assert len(set(numbers)) == len(numbers)
        assert counters[f"number:{adapter}"] >= max(numbers), "a number would be given twice"
    ids = [row["lora_id"] for row in found["versions"]]
    assert len(set(ids)) == len(ids)
    assert counters.get("lora_id", 0) >= max(ids, default=0), "a LoRA id would be given twice"


def _check_aliases(found: Mapping[str, Rows], states: Mapping[tuple[str, int], VersionState]) -> None:
    replayed: dict[tuple[str, str], int | None] = {}
    for row in found["alias_history"]:
        key = row["adapter"], row["alias"]
        assert replayed.get(key) == row["previous"], f"{key}: a change is missing from its history"
        replayed[key] = row["number"]
    assert {(*key, n) for key, n in replayed.items() if n is not None} == _alias_rows(found)
    for adapter, alias, number in _alias_rows(found):
        allowed = {VersionState.ACCEPTED} | ({VersionState.CANDIDATE} if alias.startswith("candidate-") else set())
        assert number == 0 or states[adapter, number] in allowed, f"{adapter}@{alias} -> {number}"


def _check_events(found: Mapping[str, Rows]) -> None:
    """Every change has exactly one event."""
    for row in found["versions"]:
        own = [e["kind"] for e in found["events"] if (e["adapter"], e["number"]) == (row["adapter"], row["number"])]
        assert own.count("version.published") == 1, row
        assert own.count("version.files_removed") == (row["files_removed_at"] is not None), row
        states = [
            VersionState.CANDIDATE,
            *(state for kind in own for state in VersionState if kind == f"version.{state}"),
        ]
        assert states[-1] == row["state"], f"the last change of {row} has no event"
        assert all(a != b for a, b in pairwise(states)), f"a change of {row} has two events"
    changes = [(e["adapter"], e["data"]["alias"]) for e in found["events"] if e["kind"].startswith("alias.")]
    assert changes == [(row["adapter"], row["alias"]) for row in found["alias_history"]]
    about: dict[str, list[str]] = {}
    for event in found["events"]:
        if "rollout_id" in event["data"]:
            about.setdefault(event["data"]["rollout_id"], []).append(event["kind"])
    for row in found["rollouts"]:
        seen = about[row["id"]]
        assert seen[0] == "rollout.started"
        assert seen.count("rollout.step") == row["step"] + 1, row
        ended = [kind for kind in seen if kind in ("rollout.promoted", "rollout.aborted")]
        assert ended == ([] if RolloutState(row["state"]).is_active else [f"rollout.{row['state']}"]), row


def _rows(connection: sa.Connection, name: str) -> Rows:
    table = tables.metadata.tables[name]
    return [dict(row) for row in connection.execute(sa.select(table).order_by(*table.primary_key)).mappings()]


def _plain(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    if name == "versions":
        row = {**row, "files_removed_at": row["files_removed_at"] is not None}
    dropped = _PASSING | ({"id"} if name in _WITH_RANDOM_IDS else set())
    return {
        key: _plain("", value) if isinstance(value, dict) else value for key, value in row.items() if key not in dropped
    }


def _alias_rows(found: Mapping[str, Rows]) -> set[tuple[str, str, int]]:
    return {(row["adapter"], row["alias"], row["number"]) for row in found["aliases"]}


def _by_adapter(rows: Rows) -> dict[str, Rows]:
    found: dict[str, Rows] = {}
    for row in rows:
        found.setdefault(row["adapter"], []).append(row)
    return found


def _list(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())
