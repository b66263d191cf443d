"""A database as an old release left it: the first schema, with a row in each table that others hang on."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import command

from scion_adapters import tables
from scion_adapters.database import Database

FIRST_REVISION = "0001"

# One row of the first schema per table that others hang on. A later revision that adds a NOT NULL column must fill it.
OLD_ROWS: list[tuple[str, dict[str, Any]]] = [
    ("adapters", {"name": "chat", "created_at": 1.0}),
    ("counters", {"name": "number:chat", "value": 7}),
    ("counters", {"name": "lora_id", "value": 9}),
    (
        "versions",
        {
            "adapter": "chat", "number": 7, "lora_id": 9, "digest": "sha256:" + "a" * 64, "state": "accepted",
            "parent": 0, "base_fingerprint": "sha256:" + "b" * 64, "metrics": "{}", "rank": 16, "size_bytes": 1000,
            "evaluation_key": "key", "created_at": 1.0, "created_by": "test",
        },
    ),
    ("aliases", {"adapter": "chat", "alias": "champion", "number": 7, "updated_at": 2.0}),
    ("events", {"at": 1.0, "kind": "version.published", "actor": "test", "reason": "", "data": "{}"}),
    (
        "completions",
        {
            "id": "chatcmpl-1", "record_id": "r1", "adapter": "chat", "number": 7, "probability": 1.0,
            "requested_model": "chat", "route": "chat", "request": "{}", "choices": "[]", "latency_ms": 3.0,
            "stream": False, "created_at": 3.0,
        },
    ),
    (
        "feedback",
        {
            "id": "fb-1", "sequence": 1, "body_digest": "c" * 64, "completion_id": "chatcmpl-1", "choice_index": 0,
            "name": "rating", "value": 1.0, "source": "user", "metadata": "{}", "counts": True, "created_at": 4.0,
        },
    ),
]  # fmt: skip


def make_old(database: Database) -> None:
    """Bring an empty database to the first revision and fill it."""
    command.upgrade(database._alembic(), FIRST_REVISION)
    assert database.current_revision() == FIRST_REVISION
    with database.write() as connection:
        for table, row in OLD_ROWS:  # in words of the old schema, hence no use of tables.py
            columns, marks = ", ".join(row), ", ".join(f":{name}" for name in row)
            connection.execute(sa.text(f"INSERT INTO {table} ({columns}) VALUES ({marks})"), row)


def check_rows(database: Database) -> None:
    """Every row of `make_old` is there, and once."""
    with database.read() as connection:
        for table, row in OLD_ROWS:
            query = sa.text(f"SELECT count(*) FROM {table} WHERE {next(iter(row))} = :value")
            assert connection.execute(query, {"value": next(iter(row.values()))}).scalar() == 1, table
        version = connection.execute(sa.select(tables.versions)).mappings().one()
        assert (version["number"], version["lora_id"], version["metrics"]) == (7, 9, {})
