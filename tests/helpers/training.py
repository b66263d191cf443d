"""A complete small project for tests of training: a tiny random base, a configuration file, a database with ratings."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from scion_adapters import tables
from scion_adapters.clock import new_id
from scion_adapters.database import Database
from scion_adapters.records import VersionRef
from scion_adapters.registry import open_registry
from scion_adapters.settings import Settings, load_settings
from scion_feedback.selection import SnapshotRow
from tests.helpers.databases import sqlite_database
from tests.helpers.tiny_model import build_tiny_model

DEFAULTS = {
    "trainer.min_ratings": 8,
    "trainer.threads": 1,
    "trainer.checkpoint_every_steps": 3,
    "trainer.heldout_share": 0.1,
    "trainer.lora.rank": 4,
    "trainer.lora.alpha": 8,
    "trainer.kto.batch_size": 8,
    "trainer.kto.epochs": 2,
    "trainer.sft.batch_size": 8,
    "trainer.sft.epochs": 2,
    "trainer.reward.batch_size": 8,
    "trainer.reward.epochs": 2,
    "trainer.reward.members": 2,
}


@dataclass(frozen=True, slots=True)
class Project:
    """`settings` were read from `file`, so that a child process sees the same."""

    directory: Path
    file: Path
    settings: Settings
    database: Database


def make_project(directory: Path, *, base: Path | None = None, **changes: object) -> Project:
    """A project in `directory`; `changes` are settings with `__` for dots, such as `trainer__seed=1`."""
    directory.mkdir(parents=True, exist_ok=True)
    base = base or build_tiny_model(directory / "base")
    values: dict[str, object] = {"base.model": str(base), **DEFAULTS}
    values.update({key.replace("__", "."): value for key, value in changes.items()})
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if value is not None]
    file = directory / "scion.toml"
    file.write_text("\n".join([*lines, "adapters.chat = {}", ""]), encoding="utf-8")
    return Project(directory, file, load_settings(file), sqlite_database(directory))


def snapshot_row(**changes: Any) -> SnapshotRow:
    """A liked answer, except for `changes`."""
    row = SnapshotRow(
        feedback_id="fb",
        completion_id="c",
        split="train",
        kind="rating",
        messages=[{"role": "user", "content": "hi"}],
        answer="hello",
        liked=True,
        correction=None,
        user_hash="u",
        conversation=None,
        number=0,
        created_at=0.0,
    )
    return replace(row, **changes)


def add_ratings(
    database: Database,
    count: int,
    *,
    adapter: str = "chat",
    number: int = 0,
    liked_share: float = 0.4,
    corrections: int = 0,
    seed: int = 0,
    at: float = 1_000_000.0,
    users: int = 20,
    said: Callable[[random.Random], tuple[str, str, bool]] | None = None,
) -> None:
    """`count` answers of `adapter:number`, each rated by a user; the first `corrections` are corrected as well.

    `said` draws a question, an answer and whether it is liked; None: numbers, the first of every ten of them liked.
    """
    rng = random.Random(seed)
    completions, votes = [], []
    with database.read() as connection:
        sequence = int(connection.execute(sa.select(sa.func.max(tables.feedback.c.sequence))).scalar() or 0)
    for index in range(count):
        completion_id, user = new_id("chatcmpl"), f"user-{rng.randrange(users):04d}"
        created_at = at + index
        if said is None:
            question, answer = number_question(rng), f"it is {rng.randrange(1000)}."
            liked = index % 10 < liked_share * 10
        else:
            question, answer, liked = said(rng)
        completions.append(
            {
                "id": completion_id,
                "record_id": new_id("rec"),
                "adapter": adapter,
                "number": number,
                "probability": 1.0,
                "requested_model": adapter,
                "route": "chat",
                "user_hash": user,
                "request": {"messages": [{"role": "user", "content": question}]},
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": answer},
                        "finish_reason": "stop",
                    }
                ],
                "finish_reason": "stop",
                "latency_ms": 10.0,
                "stream": False,
                "created_at": created_at,
            }
        )
        votes.append(
            {
                "id": new_id("fb"),
                "sequence": sequence + index + 1,
                "body_digest": f"{rng.getrandbits(128):032x}",
                "completion_id": completion_id,
                "choice_index": 0,
                "name": "rating",
                "value": float(liked),
                "correction": "so it is." if index < corrections else None,
                "user_hash": user,
                "source": "user",
                "metadata": {},
                "counts": True,
                "created_at": created_at,
            }
        )
    with database.write() as connection:
        if completions:
            connection.execute(sa.insert(tables.completions), completions)
            connection.execute(sa.insert(tables.feedback), votes)


def number_question(rng: random.Random) -> str:
    return f"what is {rng.randrange(1000)}?"


def make_champion(project: Project, ref: VersionRef) -> None:
    """As a finished rollout would."""
    registry = open_registry(project.settings, project.database)
    registry.accept(ref, actor="test", reason="test")
    with project.database.write() as connection:
        connection.execute(sa.delete(tables.aliases))
        connection.execute(
            sa.insert(tables.aliases).values(adapter=ref.adapter, alias="champion", number=ref.number, updated_at=0.0)
        )
