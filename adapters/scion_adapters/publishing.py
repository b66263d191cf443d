"""Giving a stored, checked artifact its number and LoRA id, in one transaction. Does not look at files."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from scion_adapters import tables
from scion_adapters.artifacts import Artifact
from scion_adapters.database import insert_ignore, next_value
from scion_adapters.errors import InvalidInputError, RejectedError
from scion_adapters.events import bump_routing, record
from scion_adapters.preflight import AdapterInfo
from scion_adapters.records import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    STEPS_PREFIX,
    Version,
    VersionRef,
    VersionState,
    check_adapter_name,
    is_step_line,
)
from scion_adapters.versions import find_run, load_version, lock_adapter

LORA_ID_COUNTER = "lora_id"


@dataclass(frozen=True, slots=True)
class NewVersion:
    """All of a version that does not come from the database itself."""

    adapter: str
    artifact: Artifact
    info: AdapterInfo
    parent: int
    base_fingerprint: str
    recipe: str | None
    run_id: str | None
    snapshot_id: str | None
    metrics: Mapping[str, Any]


def check_publishable(name: str, base_names: Collection[str]) -> None:
    """Whether versions can be published under `name`, or RejectedError: invalid_name, reserved_name, base_name."""
    try:
        check_adapter_name(name)
    except InvalidInputError as error:
        raise RejectedError(str(error), reason="invalid_name") from error
    if name in (CHAMPION, CHALLENGER, PREVIOUS):
        raise RejectedError(
            f"{name!r} is what an alias of every adapter is called: choose another name for the adapter",
            reason="reserved_name",
        )
    if is_step_line(name):
        raise RejectedError(
            f"{name!r}: names that begin with {STEPS_PREFIX!r} are for the steps of runs: choose another name",
            reason="reserved_name",
        )
    if name in {base.casefold() for base in base_names}:
        raise RejectedError(
            f"the base is served as {name!r}: choose another name for the adapter, or set base.served_name",
            reason="base_name",
        )


def ensure_adapter_in(connection: sa.Connection, name: str, *, clock_value: float) -> None:
    """Make the adapter in the caller's transaction if there is none of that name."""
    row = {"name": check_adapter_name(name), "created_at": clock_value}
    if insert_ignore(connection, tables.adapters, [row]):
        bump_routing(connection)  # servers answer to a new name


def insert_version(
    connection: sa.Connection, new: NewVersion, *, clock_value: float, actor: str, reason: str, is_recorded: bool = True
) -> Version:
    """The new candidate, or the version that `new.run_id` published before. `is_recorded` False: without an event."""
    ensure_adapter_in(connection, new.adapter, clock_value=clock_value)
    lock_adapter(connection, new.adapter)  # one publication at a time, or two processes publish the same run
    if new.run_id is not None and (published := find_run(connection, new.run_id)):
        return published
    number = next_value(connection, f"number:{new.adapter}")
    connection.execute(
        sa.insert(tables.versions).values(
            adapter=new.adapter,
            number=number,
            lora_id=next_value(connection, LORA_ID_COUNTER),
            digest=new.artifact.digest,
            state=VersionState.CANDIDATE,
            parent=new.parent,
            base_fingerprint=new.base_fingerprint,
            recipe=new.recipe,
            run_id=new.run_id,
            snapshot_id=new.snapshot_id,
            metrics=dict(new.metrics),
            rank=new.info.rank,
            size_bytes=new.artifact.size_bytes,
            evaluation_key=secrets.token_urlsafe(24),
            created_at=clock_value,
            created_by=actor[:128],
        )
    )
    data = {
        "digest": new.artifact.digest,
        "parent": new.parent,
        "run_id": new.run_id,
        "rank": new.info.rank,
        "num_parameters": new.info.num_parameters,
    }
    if is_recorded:
        record(
            connection,
            clock_value,
            "version.published",
            adapter=new.adapter,
            number=number,
            actor=actor,
            reason=reason,
            data=data,
        )
    return load_version(connection, VersionRef(new.adapter, number))
