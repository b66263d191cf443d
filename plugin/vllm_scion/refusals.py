"""Refused requests as events: counted per reason, client and path, so that a flood writes a line a minute, not a table.

Everything here runs on the event loop and keeps a bounded number of counts; writing them is the caller's work.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from scion_adapters.clock import Clock, now
from scion_adapters.database import Database
from scion_adapters.events import record
from vllm_scion.authority import Refusal

QUIET_S = 60.0
"""After an event of one kind, further refusals of that kind are only counted for so long."""
MAX_KINDS = 500
MAX_PATH = 200

Kind = tuple[str, str, str]


@dataclass(slots=True)
class _Count:
    first: Refusal
    number: int
    silent_until: float


@dataclass(slots=True)
class Refusals:
    """Counts refusals and says when which are due to be written."""

    monotonic: Callable[[], float] = time.monotonic
    _counts: dict[Kind, _Count] = field(default_factory=dict)

    def add(self, refusal: Refusal) -> None:
        """Count one. Past `MAX_KINDS` kinds, the client and the path are not told apart any more."""
        kind = (refusal.reason, refusal.client, refusal.path[:MAX_PATH])
        if kind not in self._counts and len(self._counts) >= MAX_KINDS:
            kind = (refusal.reason, "many", "many")
        count = self._counts.get(kind)
        if count is None:
            self._counts[kind] = _Count(refusal, 1, 0.0)
        else:
            count.number += 1

    def take_due(self) -> list[tuple[Kind, Refusal, int]]:
        """What is to be written now, with how often it happened. Kinds that fell silent are forgotten."""
        at, due = self.monotonic(), []
        for kind, count in list(self._counts.items()):
            if count.silent_until > at:
                continue
            if count.number:
                due.append((kind, count.first, count.number))
                count.number, count.silent_until = 0, at + QUIET_S
            else:
                del self._counts[kind]
        return due


def write_refusals(database: Database, due: list[tuple[Kind, Refusal, int]], *, actor: str, clock: Clock = now) -> None:
    """One event each. What was presented is not in it, only the public part of something that looked like a key."""
    with database.write() as connection:
        for (reason, client, path), refusal, number in due:
            data = {"reason": reason, "client": client, "path": path, "key_id": refusal.key_id, "count": number}
            what = f"{number} request(s) to {path} from {client} refused: {reason}"
            record(connection, clock(), "access.refused", actor=actor, reason=what, data=data)
