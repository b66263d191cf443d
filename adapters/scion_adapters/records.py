"""The records that cross package borders: frozen, typed, free of behaviour except for parsing a model name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from scion_adapters.errors import InvalidInputError

CHAMPION = "champion"
CHALLENGER = "challenger"
PREVIOUS = "previous"
BASE_NUMBER = 0
"""The number that stands for the base itself, with no adapter: what `chat` answers with before its first promotion."""
RED_TEAM = "red_team"
"""Source and name of votes, and route of answers, that a red team's probes made: they are never a user's."""

STEPS_PREFIX = "steps-"
"""Lines of versions whose names begin so hold the steps of a run (steps.py): they are never routed."""

_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?")


class VersionState(StrEnum):
    CANDIDATE = "candidate"  # published, not through the gates yet: only the gates may ask it
    ACCEPTED = "accepted"  # passed the gates: may be routed to
    REJECTED = "rejected"  # failed a gate: can never be routed to
    RETIRED = "retired"  # taken out of service for good: gc may remove its files
    QUARANTINED = "quarantined"  # its files are missing or damaged: never routed to


class RolloutState(StrEnum):
    UNAPPROVED = "unapproved"  # loaded, and without traffic until a person approves it
    PROGRESSING = "progressing"
    PAUSED = "paused"
    PROMOTED = "promoted"
    ABORTED = "aborted"

    @property
    def is_active(self) -> bool:
        return self in (RolloutState.UNAPPROVED, RolloutState.PROGRESSING, RolloutState.PAUSED)


class RunState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class VersionRef:
    """`chat:7`."""

    adapter: str
    number: int

    def __str__(self) -> str:
        return f"{self.adapter}:{self.number}"


@dataclass(frozen=True, slots=True)
class Version:
    adapter: str
    number: int
    lora_id: int
    digest: str
    state: VersionState
    parent: int
    base_fingerprint: str
    rank: int
    size_bytes: int
    evaluation_key: str
    created_at: float
    created_by: str
    recipe: str | None = None
    run_id: str | None = None
    snapshot_id: str | None = None
    reason: str | None = None
    files_removed_at: float | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ref(self) -> VersionRef:
        return VersionRef(self.adapter, self.number)


@dataclass(frozen=True, slots=True)
class Rollout:
    id: str
    adapter: str
    number: int
    stable: int
    state: RolloutState
    steps: tuple[float, ...]
    step: int
    every_s: float | None
    after_requests: int | None
    guard: bool
    step_started_at: float
    message: str
    actor: str
    created_at: float
    updated_at: float
    revision: int
    paused_by: str | None = None

    @property
    def weight(self) -> float:
        """The share of subjects, 0..1, that the challenger gets now. For routing: a champion is no challenger."""
        return self.steps[self.step] if self.state.is_active and self.step >= 0 else 0.0

    @property
    def share(self) -> float:
        """The share of users, 0..1, that its version has by it: all of them once promoted. For people and scripts."""
        return 1.0 if self.state is RolloutState.PROMOTED else self.weight


@dataclass(frozen=True, slots=True)
class Replica:
    id: str
    host: str
    pid: int
    url: str
    started_at: float
    heartbeat_at: float
    max_loras: int
    max_cpu_loras: int
    max_lora_rank: int
    loaded: frozenset[int]
    failed: Mapping[int, str]
    in_flight: Mapping[int, int]
    routing_revision: int
    base_fingerprint: str
    engine: str = ""


@dataclass(frozen=True, slots=True)
class Event:
    id: int
    at: float
    kind: str
    adapter: str | None
    number: int | None
    actor: str
    reason: str
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    id: str
    adapter: str
    recipe: str
    state: RunState
    parent: int
    config: Mapping[str, Any]
    metrics: Mapping[str, Any]
    directory: str
    attempt: int
    actor: str
    created_at: float
    updated_at: float
    snapshot_id: str | None = None
    candidate: int | None = None
    error: str | None = None
    finished_at: float | None = None


def is_step_line(adapter: str) -> bool:
    """Whether a line holds the steps of a run, and no version that users could get."""
    return adapter.startswith(STEPS_PREFIX)


def check_adapter_name(name: str) -> str:
    """The name itself, or InvalidInputError: lower-case ASCII letters, digits, `.`, `_`, `-`; at most 64 characters."""
    if not _NAME.fullmatch(name):
        raise InvalidInputError(
            f"adapter name {name[:80]!a} ({len(name)} characters): expected 1 to 64 of a-z 0-9 . _ - that begin and "
            "end with a letter or digit",
            field="adapter",
        )
    return name


def parse_version_ref(text: str) -> VersionRef:
    """`chat:7` -> VersionRef. Raises InvalidInputError for anything else, an alias included."""
    name, sep, number = text.partition(":")
    if not sep or not number.isascii() or not number.isdigit() or len(number) > 9:
        raise InvalidInputError(
            f"{text[:80]!r} is not a version: expected NAME:NUMBER, such as chat:7", field="version"
        )
    return VersionRef(check_adapter_name(name), int(number))
